#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "simd.h"

namespace octavo {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kSpinsPerClockRead = 32;

uint32_t phase_number(uint64_t ticket) { return static_cast<uint32_t>(ticket >> 32); }
uint32_t items_left(uint64_t ticket) { return static_cast<uint32_t>(ticket); }

void spin_pause() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Threads of the pool take no signals: the interpreter's handlers belong on its own threads.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &saved_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }

 private:
  sigset_t saved_;
};

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), owner_process_(getpid()) {
  BlockedSignals inherited_by_the_threads;
  for (int thread = 1; thread < num_threads; ++thread) threads_.emplace_back([this, thread] { work(thread); });
}

bool ThreadPool::is_forked() const { return getpid() != owner_process_; }

ThreadPool::~ThreadPool() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ThreadPool::run(Job& job, const std::vector<int>& items_per_phase) {
  DefaultFloatMode float_mode;
  if (num_threads_ == 1 || is_forked()) {
    for (size_t phase = 0; phase < items_per_phase.size(); ++phase)
      for (int item = 0; item < items_per_phase[phase]; ++item) job.run_item(static_cast<int>(phase), item, 0);
    return;
  }
  std::lock_guard<std::mutex> lock(run_mutex_);
  job_ = &job;
  items_per_phase_ = &items_per_phase;
  phase_ = -1;
  uint64_t ticket = ticket_.load();
  const auto num_phases = std::count_if(items_per_phase.begin(), items_per_phase.end(), [](int n) { return n > 0; });
  const uint32_t last = phase_number(ticket) + static_cast<uint32_t>(num_phases) + 1;
  start_next_phase();
  while (phase_number(ticket_.load(std::memory_order_acquire)) != last) {
    if (!run_one_item(0, ticket) && phase_number(ticket) != last) wait_for_next_phase(ticket);
  }
}

void ThreadPool::work(int thread) {
  DefaultFloatMode float_mode;
  uint64_t ticket = 0;
  while (!stop_.load(std::memory_order_relaxed)) {
    if (!run_one_item(thread, ticket)) wait_for_next_phase(ticket);
  }
}

// Take and run an item. Returns false when the current phase has none left; `ticket` is then what
// was seen of it.
bool ThreadPool::run_one_item(int thread, uint64_t& ticket) {
  ticket = ticket_.load(std::memory_order_acquire);
  do {
    if (items_left(ticket) == 0) return false;
  } while (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel, std::memory_order_acquire));
  // The item taken keeps the phase, and with it the fields below, from changing.
  const int num_items = (*items_per_phase_)[phase_];
  job_->run_item(phase_, num_items - static_cast<int>(items_left(ticket)), thread);
  if (num_finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_items) start_next_phase();
  return true;
}

// Called by whoever finished the last item of a phase. After the last phase the ticket moves on
// once more, without items: that is what the caller of run waits for.
void ThreadPool::start_next_phase() {
  num_finished_.store(0, std::memory_order_relaxed);
  const int num_phases = static_cast<int>(items_per_phase_->size());
  do {
    ++phase_;
  } while (phase_ < num_phases && (*items_per_phase_)[phase_] == 0);
  const uint32_t number = phase_number(ticket_.load(std::memory_order_relaxed)) + 1;
  const uint32_t num_items = phase_ == num_phases ? 0 : (*items_per_phase_)[phase_];
  ticket_.store(uint64_t{number} << 32 | num_items);
  // A phase of one item is run by this thread: waking others for it would only cost time.
  if (num_items != 1 && num_sleeping_.load() > 0) {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    wake_.notify_all();
  }
}

void ThreadPool::wait_for_next_phase(uint64_t ticket) {
  const auto changed = [this, ticket] { return phase_number(ticket_.load()) != phase_number(ticket) || stop_; };
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kSpinsPerClockRead; ++i) {
      if (changed()) return;
      spin_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  std::unique_lock<std::mutex> lock(sleep_mutex_);
  num_sleeping_.fetch_add(1);
  wake_.wait(lock, changed);
  num_sleeping_.fetch_sub(1);
}

}  // namespace octavo
