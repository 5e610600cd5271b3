// Threads that run the items of one phase after the other.
#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <vector>

namespace octavo {

// Memory that is read soon.
struct MemoryRange {
  const char* begin = nullptr;
  size_t size = 0;
};

// Work in phases. All items of a phase end before the next phase begins.
class Job {
 public:
  virtual ~Job() = default;

  // Run items [begin, end). `thread` is below the pool's number of threads and tells scratch memory apart.
  virtual void run_items(int phase, int begin, int end, int thread) = 0;

  // Whether neighbouring items of a phase cost less together than one by one.
  virtual bool has_runs(int /*phase*/) const { return false; }

  // What an item reads first, if that is known; whoever waits for its phase fetches it meanwhile.
  virtual MemoryRange first_read(int /*phase*/, int /*item*/) const { return {}; }

  // Called between two phases, by one thread, while no item runs. After the last phase `phase` is
  // the number of phases.
  virtual void phase_begins(int /*phase*/) {}
};

// The items of a phase are dealt out to the threads in equal neighbouring shares, so that each
// thread reads its part of the weights in order; a thread that is through with its own share helps
// with the others'. It takes one item at a time, or a part of what is left of a share where items
// cost less together: so the last runs are short (guided self-scheduling, Polychronopoulos and Kuck 1987).
//
// A barrier here waits for the items of a phase, not for the threads: a thread that the system
// put aside between two runs of items holds nobody up, and joins whatever phase is running when it comes
// back. So beside a busy process the pool loses that core's share and no more.
//
// A thread without an item spins for tens of microseconds, which covers the gap between phases,
// and then sleeps.
class ThreadPool {
 public:
  // Throws std::system_error, and leaves no thread behind, where the system refuses one.
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  // Whether this process is a child of the one that started the threads. It has none of them, and
  // must not destroy the pool: that would wait for them.
  bool is_forked() const;

  // Run all phases of `job`; the calling thread takes part. Calls from several threads take turns.
  // After a fork the child has no threads but its own, and runs everything on it. Throws what the first of the items
  // threw that did: those that had not begun by then are not run.
  void run(Job& job, const std::vector<int>& items_per_phase);

  // A thread has done a piece of work. Jobs whose items take long say so oftener than at the end of a run of items.
  void moved(int thread) {
    std::atomic<uint64_t>& count = progress_[thread].count;
    count.store(count.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
  }

  // How many pieces of work the threads have done since they started. For any thread.
  uint64_t progress() const;

  // Run `body(item, thread)` for every item.
  template <class Body>
  void for_each(int num_items, const Body& body) {
    struct ForEach : Job {
      explicit ForEach(const Body& b) : body(b) {}
      void run_items(int, int begin, int end, int thread) override {
        for (int item = begin; item < end; ++item) body(item, thread);
      }
      const Body& body;
    } job(body);
    run(job, {num_items});
  }

 private:
  // A thread's share of the current phase, in a cache line of its own.
  struct alignas(64) Share {
    // The number of the phase since the start of the pool, shifted by 32, and the items of the
    // share that nobody has taken. One word, so that a late thread can never take an item of
    // another phase than the one it looked at.
    std::atomic<uint64_t> ticket{0};
    std::atomic<bool> has_runs{false};
    // What the thread will read first in the phase after. Maybe out of date, which is harmless.
    std::atomic<const char*> soon{nullptr};
    std::atomic<size_t> soon_size{0};
  };

  // Written by one thread, and in a cache line that others read only to see whether this process lives.
  struct alignas(64) Progress {
    std::atomic<uint64_t> count{0};
  };

  // What a thread of the pool is started with.
  struct Worker {
    ThreadPool* pool;
    int thread;
  };

  static void* start(void* worker);
  void stop();
  void work(int thread);
  void run_taken(int begin, int end, int thread);
  bool run_items(int thread);
  static int take_items(Share& share, uint32_t& items_left);
  void start_next_phase();
  template <class Condition>
  void wait_until(int thread, uint64_t seen, const Condition& is_over);
  void fetch_soon(int thread, uint64_t seen) const;

  int first_item(int num_items, int thread) const {
    return static_cast<int>(int64_t{num_items} * thread / num_threads_);
  }

  const int num_threads_;
  const int owner_process_;
  std::vector<Worker> workers_;     // all threads but the caller's
  std::vector<pthread_t> threads_;  // of workers_, as far as they were started
  std::mutex run_mutex_;

  // Written by the thread that starts a phase, while no item is left or running.
  Job* job_ = nullptr;
  const std::vector<int>* items_per_phase_ = nullptr;
  int phase_ = 0;
  uint32_t phase_number_ = 0;

  std::vector<Share> shares_;
  std::vector<Progress> progress_;  // by thread
  alignas(64) std::atomic<int> num_finished_{0};
  // Counted when the tickets of a phase are all there. Whoever has found no item since it last changed waits for the next
  // change, and looks at no ticket meanwhile: each of those is a cache line that others write.
  alignas(64) std::atomic<uint64_t> phases_begun_{0};
  alignas(64) std::atomic<bool> running_{false};  // whether a job has phases left
  std::atomic<bool> has_failed_{false};           // whether an item of the job has thrown
  std::exception_ptr failure_;                    // written by the thread that set the flag

  alignas(64) std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stop_{false};
  std::mutex sleep_mutex_;
  std::condition_variable wake_;
};

}  // namespace octavo
