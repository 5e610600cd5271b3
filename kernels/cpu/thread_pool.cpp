#include "thread_pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "simd.h"

namespace octavo {
namespace {

constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr int kSpinsPerClockRead = 32;

constexpr uint32_t kPartOfShare = 3;  // of what is left of a share, for a thread that takes runs of items

constexpr size_t kCacheLine = 64;
constexpr size_t kPrefetchPiece = 16 * kCacheLine;  // fetched between two looks at the tickets

void spin_pause() {
#if defined(__SSE2__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Some systems give a thread 128 KiB by default, which is little for tiles on the stack.
constexpr size_t kStackBytes = size_t{4} << 20;

int checked(int num_threads) {
  if (num_threads > 0) return num_threads;
  throw std::invalid_argument("a pool has at least one thread, not " + std::to_string(num_threads));
}

// Threads of the pool take no signals: the interpreter's handlers belong on its own threads. But a fault of their own is
// theirs, or nobody would say where it was; and a profiler asks each thread.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t signals;
    sigfillset(&signals);
    for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGPROF}) sigdelset(&signals, own);
    pthread_sigmask(SIG_SETMASK, &signals, &saved_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &saved_, nullptr); }

 private:
  sigset_t saved_;
};

}  // namespace

ThreadPool::ThreadPool(int num_threads)
    : num_threads_(checked(num_threads)), owner_process_(getpid()), shares_(num_threads), progress_(num_threads) {
  for (int thread = 1; thread < num_threads; ++thread) workers_.push_back({this, thread});
  threads_.reserve(workers_.size());
  BlockedSignals inherited_by_the_threads;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, kStackBytes);
  int error = 0;
  for (Worker& worker : workers_) {
    pthread_t thread;
    error = pthread_create(&thread, &attributes, start, &worker);
    if (error != 0) break;
    threads_.push_back(thread);
  }
  pthread_attr_destroy(&attributes);
  if (error == 0) return;
  const std::string refused = std::to_string(threads_.size() + 2) + " of " + std::to_string(num_threads);
  stop();
  throw std::system_error(error, std::generic_category(),
                          "the system refuses thread " + refused + "; ask for fewer, or raise its limit of processes or memory");
}

void* ThreadPool::start(void* worker) {
  static_cast<Worker*>(worker)->pool->work(static_cast<Worker*>(worker)->thread);
  return nullptr;
}

uint64_t ThreadPool::progress() const {
  uint64_t sum = 0;
  for (const Progress& of_thread : progress_) sum += of_thread.count.load(std::memory_order_relaxed);
  return sum;
}

bool ThreadPool::is_forked() const { return getpid() != owner_process_; }

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (const pthread_t thread : threads_) pthread_join(thread, nullptr);
}

void ThreadPool::run(Job& job, const std::vector<int>& items_per_phase) {
  DefaultFloatMode float_mode;
  const int num_phases = static_cast<int>(items_per_phase.size());
  if (num_threads_ == 1 || is_forked()) {
    for (int phase = 0; phase < num_phases; ++phase) {
      job.phase_begins(phase);
      if (items_per_phase[phase] > 0) job.run_items(phase, 0, items_per_phase[phase], 0);
      moved(0);
    }
    job.phase_begins(num_phases);
    return;
  }
  std::lock_guard<std::mutex> lock(run_mutex_);
  job_ = &job;
  items_per_phase_ = &items_per_phase;
  phase_ = -1;
  has_failed_.store(false);
  running_.store(true);
  start_next_phase();
  const auto ended = [this] { return !running_.load(); };
  while (!ended()) {
    const uint64_t seen = phases_begun_.load();
    if (!run_items(0)) wait_until(0, seen, ended);
  }
  if (has_failed_.load()) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void ThreadPool::work(int thread) {
  DefaultFloatMode float_mode;
  const auto stopped = [this] { return stop_.load(); };
  while (!stopped()) {
    const uint64_t seen = phases_begun_.load();
    if (!run_items(thread)) wait_until(thread, seen, stopped);
  }
}

// Run items of the current phase, the thread's own ones first, until none is left. Returns false
// if there was none.
bool ThreadPool::run_items(int thread) {
  int num_run = 0, num_items = 0;
  for (int i = 0; i < num_threads_; ++i) {
    const int owner = (thread + i) % num_threads_;
    uint32_t items_left;
    while (const int num_taken = take_items(shares_[owner], items_left)) {
      // Until the items taken are counted, the phase and with it the fields below do not change.
      num_items = (*items_per_phase_)[phase_];
      const int begin = first_item(num_items, owner + 1) - static_cast<int>(items_left);
      run_taken(begin, begin + num_taken, thread);
      moved(thread);
      num_run += num_taken;
    }
  }
  if (num_run == 0) return false;
  if (num_finished_.fetch_add(num_run, std::memory_order_acq_rel) + num_run == num_items) start_next_phase();
  return true;
}

// Items count as run whatever comes of them: the others wait for that.
void ThreadPool::run_taken(int begin, int end, int thread) {
  if (has_failed_.load(std::memory_order_relaxed)) return;
  try {
    job_->run_items(phase_, begin, end, thread);
  } catch (...) {
    if (!has_failed_.exchange(true)) failure_ = std::current_exception();
  }
}

// Take items from the front of a share, and return how many; `items_left` counts them still.
int ThreadPool::take_items(Share& share, uint32_t& items_left) {
  uint64_t ticket = share.ticket.load(std::memory_order_acquire);
  uint32_t num_taken;
  do {
    items_left = static_cast<uint32_t>(ticket);
    if (items_left == 0) return 0;
    num_taken = share.has_runs.load(std::memory_order_relaxed) ? divide_up(items_left, kPartOfShare) : 1;
  } while (!share.ticket.compare_exchange_weak(ticket, ticket - num_taken, std::memory_order_acq_rel,
                                               std::memory_order_acquire));
  return static_cast<int>(num_taken);
}

// Called by whoever counted the last item of a phase.
void ThreadPool::start_next_phase() {
  num_finished_.store(0, std::memory_order_relaxed);
  const int num_phases = static_cast<int>(items_per_phase_->size());
  do {
    ++phase_;
  } while (phase_ < num_phases && (*items_per_phase_)[phase_] == 0);
  job_->phase_begins(phase_);
  const int num_items = phase_ == num_phases ? 0 : (*items_per_phase_)[phase_];
  if (num_items == 0) {
    running_.store(false);
  } else {
    const bool has_runs = job_->has_runs(phase_);
    const int phase_after = phase_ + 1;
    const int num_items_after = phase_after == num_phases ? 0 : (*items_per_phase_)[phase_after];
    for (int thread = 0; thread < num_threads_; ++thread) {
      const int item = first_item(num_items_after, thread);
      const MemoryRange soon = item < num_items_after ? job_->first_read(phase_after, item) : MemoryRange{};
      shares_[thread].has_runs.store(has_runs, std::memory_order_relaxed);
      shares_[thread].soon.store(soon.begin, std::memory_order_relaxed);
      shares_[thread].soon_size.store(soon.size, std::memory_order_relaxed);
    }
    // Once a thread sees items it may take them, finish the phase and start the next. That must
    // not happen before all tickets of this one are there: those without items are set first.
    const uint64_t number = uint64_t{++phase_number_} << 32;
    const auto size_of_share = [&](int thread) { return first_item(num_items, thread + 1) - first_item(num_items, thread); };
    for (int thread = 0; thread < num_threads_; ++thread)
      if (size_of_share(thread) == 0) shares_[thread].ticket.store(number, std::memory_order_relaxed);
    for (int thread = num_threads_ - 1; thread >= 0; --thread)
      if (size_of_share(thread) > 0) shares_[thread].ticket.store(number | size_of_share(thread));
    // Not the number of the phase: by now others may have ended it, and begun the next.
    phases_begun_.fetch_add(1);
  }
  // A phase of one item is run by this thread: waking others for it would only cost time.
  if (num_items != 1 && num_sleeping_.load() > 0) {
    std::lock_guard<std::mutex> lock(sleep_mutex_);
    wake_.notify_all();
  }
}

// Fetch what this thread will read first in the phase that it waits for.
void ThreadPool::fetch_soon(int thread, uint64_t seen) const {
  const char* begin = shares_[thread].soon.load(std::memory_order_relaxed);
  const size_t size = shares_[thread].soon_size.load(std::memory_order_relaxed);
  for (size_t i = 0; i < size; i += kCacheLine) {
    if (i % kPrefetchPiece == 0 && phases_begun_.load() != seen) return;
    prefetch_l2(begin + i);
  }
}

template <class Condition>
void ThreadPool::wait_until(int thread, uint64_t seen, const Condition& is_over) {
  const auto condition = [&] { return phases_begun_.load() != seen || is_over(); };
  fetch_soon(thread, seen);
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kSpinsPerClockRead; ++i) {
      if (condition()) return;
      spin_pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  std::unique_lock<std::mutex> lock(sleep_mutex_);
  num_sleeping_.fetch_add(1);
  wake_.wait(lock, condition);
  num_sleeping_.fetch_sub(1);
}

}  // namespace octavo
