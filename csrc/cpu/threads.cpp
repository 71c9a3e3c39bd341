#include "threads.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace medusa::cpu {
namespace {

constexpr double kWorthSharing = 4000;                 // nanoseconds: below, waking a thread costs more than it saves
constexpr auto kSpin = std::chrono::microseconds(30);  // how long a thread without work stays awake
// How long a worker keeps its core before it offers it to other jobs, between two pieces: a worker that the system
// interrupts inside one keeps everybody waiting, some milliseconds each time. A job that never rests on one of two
// cores made an 8-node step of SmolLM2 2.0 times as long without this, 1.6 times with it.
constexpr auto kTurn = std::chrono::milliseconds(1);
constexpr int kPiecesPerLook = 8;          // at the clock
constexpr int kMaxPieces = (1 << 20) - 1;  // what a run's fields hold
constexpr int kMaxThreads = 256;

inline void pause() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

thread_local bool inside_a_piece = false;  // a launch from inside a piece is done by its own thread
struct InsideAPiece {
  InsideAPiece() { inside_a_piece = true; }
  ~InsideAPiece() { inside_a_piece = false; }
};

// Waits for `ready`: awake for a while, then asleep. Whoever makes it true calls wake() afterwards.
class Event {
 public:
  template <class Ready>
  void wait(const Ready& ready) {
    const auto limit = std::chrono::steady_clock::now() + kSpin;
    do {
      for (int i = 0; i < 32; ++i) {
        if (ready()) return;
        pause();
      }
    } while (std::chrono::steady_clock::now() < limit);
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, ready);
    }
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }

  void wake() {
    // Sequentially consistent on both sides: either the sleeper sees the change or its waker sees the sleeper.
    if (sleepers_.load(std::memory_order_seq_cst) == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    changed_.notify_all();
  }

 private:
  std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable changed_;
};

// A thread's run of pieces, [first, last), in one word together with the number of its launch: a thread that comes late
// to a launch cannot take a piece of the next one for a piece of its own.
struct alignas(64) Run {
  std::atomic<uint64_t> word{0};

  static uint64_t pack(uint64_t launch, uint64_t first, uint64_t last) { return launch << 40 | first << 20 | last; }
  static int first(uint64_t word) { return static_cast<int>(word >> 20 & kMaxPieces); }
  static int last(uint64_t word) { return static_cast<int>(word & kMaxPieces); }
};

class Pool {
 public:
  explicit Pool(int threads) : threads_(threads), runs_(new Run[threads]) {
    try {
      for (int slot = 1; slot < threads; ++slot) workers_.emplace_back([this, slot] { work(slot); });
    } catch (const std::system_error&) {  // no more threads are to be had: the others take their pieces
    }
  }

  // Ends the threads; a launch that comes later is done by its caller alone.
  void stop() {
    std::lock_guard<std::mutex> idle(in_use_);
    stop_.store(true, std::memory_order_relaxed);
    launch_.fetch_add(1, std::memory_order_seq_cst);
    start_.wake();
    for (std::thread& worker : workers_) worker.join();
  }

  std::mutex& in_use() { return in_use_; }

  Pool* older = nullptr;

  // Throws what the first of the pieces threw, after all of them.
  void run(int pieces, Body body, const void* context) {
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    const uint64_t launch = launch_.load(std::memory_order_relaxed) + 1;
    for (int slot = 0; slot < threads_; ++slot) {
      const auto share = [&](int s) { return static_cast<uint64_t>(pieces) * s / threads_; };
      runs_[slot].word.store(Run::pack(launch & 0xffffff, share(slot), share(slot + 1)), std::memory_order_release);
    }
    launch_.store(launch, std::memory_order_seq_cst);
    start_.wake();
    take_pieces(0, pieces);
    finished_.wait([&] { return done_.load(std::memory_order_seq_cst) == pieces; });
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  void work(int slot) {
    inside_a_piece = true;
    uint64_t seen = 0;
    auto turn_ends = std::chrono::steady_clock::now() + kTurn;
    for (;;) {
      start_.wait([&] { return launch_.load(std::memory_order_seq_cst) != seen; });
      seen = launch_.load(std::memory_order_acquire);
      if (stop_.load(std::memory_order_relaxed)) return;
      for (;;) {
        const int taken = take_pieces(slot, kPiecesPerLook);
        if (taken) finished_.wake();
        if (std::chrono::steady_clock::now() >= turn_ends) {
          std::this_thread::yield();
          turn_ends = std::chrono::steady_clock::now() + kTurn;
        }
        if (taken < kPiecesPerLook) break;
      }
    }
  }

  // Does pieces until none is left to take or `most` are done; returns how many.
  int take_pieces(int slot, int most) {
    int taken = 0;
    for (int i = 0; i < threads_; ++i) {
      Run& run = runs_[(slot + i) % threads_];
      uint64_t word = run.word.load(std::memory_order_acquire);
      while (taken < most && Run::first(word) < Run::last(word)) {
        // Read before the exchange: if that succeeds, the launch was still under way, so these are its values.
        const Body body = body_.load(std::memory_order_relaxed);
        const void* context = context_.load(std::memory_order_relaxed);
        // Its owner takes from the front, a helper from the back: both walk through memory without a gap.
        const uint64_t rest = i == 0 ? word + (uint64_t{1} << 20) : word - 1;
        if (!run.word.compare_exchange_weak(word, rest, std::memory_order_acq_rel, std::memory_order_acquire)) continue;
        try {
          body(context, i == 0 ? Run::first(word) : Run::last(word) - 1);
        } catch (...) {
          std::lock_guard<std::mutex> lock(error_mutex_);
          if (!error_) error_ = std::current_exception();
        }
        ++taken;
        word = run.word.load(std::memory_order_acquire);
      }
    }
    if (taken) done_.fetch_add(taken, std::memory_order_seq_cst);
    return taken;
  }

  const int threads_;
  std::unique_ptr<Run[]> runs_;
  std::vector<std::thread> workers_;
  std::mutex in_use_, error_mutex_;
  std::exception_ptr error_;  // read by the launching thread once all pieces are done
  alignas(64) std::atomic<uint64_t> launch_{0};
  std::atomic<Body> body_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<bool> stop_{false};
  alignas(64) std::atomic<int> done_{0};
  Event start_, finished_;
};

int wanted_threads() {
  if (const char* text = std::getenv("MEDUSA_NUM_THREADS")) {
    const int threads = std::atoi(text);
    if (threads > 0) return std::min(threads, kMaxThreads);
  }
#ifdef __linux__
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof cores, &cores) == 0) return std::min(CPU_COUNT(&cores), kMaxThreads);
#endif
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMaxThreads);
}

std::mutex pool_mutex;
// Never destroyed, for another thread may be about to use it; those that set_num_threads stopped hang behind the last.
std::atomic<Pool*> pool{nullptr};
Pool* stopped = nullptr;
std::atomic<int> threads_wanted{0};

// The child of a fork has none of its parent's threads: it leaves that pool behind and starts its own when it needs
// one.
void forget_pool() {
  pool.store(nullptr, std::memory_order_relaxed);
  new (&pool_mutex) std::mutex;
}

Pool* current_pool() {
  if (Pool* existing = pool.load(std::memory_order_acquire)) return existing;
  std::lock_guard<std::mutex> lock(pool_mutex);
  if (Pool* existing = pool.load(std::memory_order_relaxed)) return existing;
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
  (void)registered;
  Pool* created = new Pool(num_threads());
  pool.store(created, std::memory_order_release);
  return created;
}

struct Arena {
  ~Arena() { std::free(data); }
  void* data = nullptr;
  size_t size = 0;
};

}  // namespace

int num_threads() {
  int threads = threads_wanted.load(std::memory_order_relaxed);
  if (threads == 0) threads_wanted.store(threads = wanted_threads(), std::memory_order_relaxed);
  return threads;
}

void set_num_threads(int threads) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  threads_wanted.store(threads < 1 ? wanted_threads() : std::min(threads, kMaxThreads), std::memory_order_relaxed);
  if (Pool* old = pool.exchange(nullptr)) {
    old->stop();
    old->older = stopped;
    stopped = old;
  }
}

void run_pieces(int pieces, double work, Body body, const void* context) {
  if (pieces > 1 && pieces <= kMaxPieces && work >= kWorthSharing && num_threads() > 1 && !inside_a_piece) {
    Pool* shared = current_pool();
    // A second Python thread that launches meanwhile does its own work: results do not depend on the threads.
    std::unique_lock<std::mutex> lock(shared->in_use(), std::try_to_lock);
    if (lock) {
      const InsideAPiece here;
      return shared->run(pieces, body, context);
    }
  }
  for (int piece = 0; piece < pieces; ++piece) body(context, piece);
}

void* scratch(Scratch purpose, size_t bytes) {
  static thread_local Arena arenas[4];
  Arena& arena = arenas[static_cast<int>(purpose)];
  if (bytes > arena.size) {
    std::free(arena.data);
    const size_t size = (bytes + bytes / 2 + 4095) / 4096 * 4096;
    arena.data = std::aligned_alloc(64, size);
    arena.size = arena.data ? size : 0;
    if (!arena.data) throw std::bad_alloc();
  }
  return arena.data;
}

}  // namespace medusa::cpu
