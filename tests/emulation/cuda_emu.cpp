#include "cuda_emu.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "cuda/ops.h"

namespace emu {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kCanary = 4096;
constexpr unsigned char kCanaryByte = 0xA5;

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

struct Thread {
  dim3 index;
  State state;
  bool started, waited;
  jmp_buf where;
  WarpWork work;
  void* data;
  std::vector<Copy> copies;
  std::vector<std::vector<Copy>> groups;
};

std::vector<Thread> threads;
std::vector<unsigned char*> stacks;  // kept from launch to launch
jmp_buf scheduler;
ucontext_t scheduler_context;
int running;
const std::function<void()>* thread_body;
std::vector<unsigned char> shared_storage;
unsigned char* shared_base;
std::string failure;  // an exception must not cross a fiber's stack

// swapcontext costs a system call for the signal mask; setjmp and longjmp switch the fibers once they exist.
void to_scheduler() {
  if (!_setjmp(threads[running].where)) _longjmp(scheduler, 1);
}

void fiber_main() {
  try {
    (*thread_body)();
    require_previous_kernel();
  } catch (const std::exception& error) {
    failure = error.what();
  }
  threads[running].state = State::done;
  _longjmp(scheduler, 1);
}

void resume(int i) {
  running = i;
  Thread& t = threads[i];
  thread_index = t.index;
  if (_setjmp(scheduler)) return;
  if (t.started) _longjmp(t.where, 1);
  t.started = true;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stacks[i];
  context.uc_stack.ss_size = kStack - i % 61 * 64;  // tops of stacks at equal offsets would share a few cache sets
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
  setcontext(&context);
}

void do_copy(const Copy& c) {
  if (c.valid) {
    std::memcpy(c.to, c.from, 16);
  } else {
    std::memset(c.to, 0, 16);
  }
}

void run_block(bool reversed) {
  const int n = static_cast<int>(threads.size());
  for (int live = n; live;) {
    bool ran = false;
    for (int k = 0; k < n; ++k) {
      const int i = reversed ? n - 1 - k : k;
      if (threads[i].state != State::ready) continue;
      resume(i);
      ran = true;
      if (!failure.empty()) throw std::runtime_error(failure);
      live -= threads[i].state == State::done;
    }
    const bool all_wait =
        std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.state == State::at_barrier; });
    if (all_wait) {
      for (Thread& t : threads) t.state = State::ready;
    } else if (!ran && live) {
      throw std::runtime_error("emulation: a barrier or warp collective that not every thread reaches");
    }
  }
}

}  // namespace

void block_barrier() {
  threads[running].state = State::at_barrier;
  to_scheduler();
}

void warp_collective(WarpWork work, void* data) {
  Thread* warp = &threads[running / kWarp * kWarp];
  threads[running].work = work;
  threads[running].data = data;
  threads[running].state = State::in_warp;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (warp[lane].state != State::in_warp) {
      to_scheduler();
      return;
    }
  }
  void* gathered[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    if (warp[lane].work != work) throw std::runtime_error("emulation: a warp's lanes are at different collectives");
    gathered[lane] = warp[lane].data;
  }
  work(gathered);
  for (int lane = 0; lane < kWarp; ++lane) warp[lane].state = State::ready;
}

void wait_for_previous_kernel() { threads[running].waited = true; }

void require_previous_kernel() {
  if (!threads[running].waited) throw std::runtime_error("emulation: a thread did not wait for the previous kernel");
}

void copy_later(void* to, const void* from, bool valid) {
  require_previous_kernel();
  std::memset(to, 0xFF, 16);
  threads[running].copies.push_back({to, from, valid});
}

void commit_copies() {
  Thread& t = threads[running];
  t.groups.push_back(std::move(t.copies));
  t.copies.clear();
}

void wait_for_copies(size_t pending_groups) {
  Thread& t = threads[running];
  if (t.groups.size() <= pending_groups) return;
  const auto end = t.groups.end() - pending_groups;
  for (auto group = t.groups.begin(); group != end; ++group) {
    for (const Copy& c : *group) do_copy(c);
  }
  t.groups.erase(t.groups.begin(), end);
}

unsigned char* shared_memory() { return shared_base; }

void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  const size_t count = size_t(block.x) * block.y * block.z;
  if (count == 0 || count > 1024 || count % kWarp) throw std::runtime_error("emulation: threads per block");
  if (size_t(grid.x) * grid.y * grid.z == 0) throw std::runtime_error("emulation: an empty grid");
  if (shared_bytes > kSharedLimit) throw std::runtime_error("emulation: too much shared memory");
  while (stacks.size() < count) {
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(stack));
  }
  shared_storage.resize(shared_bytes + kCanary + 128);
  shared_base = shared_storage.data() + (-reinterpret_cast<uintptr_t>(shared_storage.data()) & 127);
  block_size = block;
  grid_size = grid;
  thread_body = &body;
  failure.clear();
  const bool reversed = std::getenv("MEDUSA_EMULATE_REVERSED") != nullptr;
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  for (size_t k = 0; k < blocks; ++k) {
    const size_t b = reversed ? blocks - 1 - k : k;
    block_index = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    std::memset(shared_base, 0xFF, shared_bytes);
    std::memset(shared_base + shared_bytes, kCanaryByte, kCanary);
    threads.assign(count, Thread{});
    for (size_t i = 0; i < count; ++i) {
      threads[i].index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
    }
    run_block(reversed);
    const unsigned char* end = shared_base + shared_bytes;
    if (std::any_of(end, end + kCanary, [](unsigned char c) { return c != kCanaryByte; })) {
      throw std::runtime_error("emulation: a write past the end of shared memory");
    }
  }
}

}  // namespace emu

namespace medusa::cuda {

int device_count(std::string* reason) {
  *reason = "emulated";
  return 1;
}

const char* error_string(int) { return "the emulated launch was refused"; }

float to_float(f16 x) {
  _Float16 h;
  std::memcpy(&h, &x.bits, 2);
  return static_cast<float>(h);
}

template <>
float from_float<float>(float x) {
  return x;
}

template <>
bf16 from_float<bf16>(float x) {
  const uint32_t u = __float_as_uint(x);
  if (x != x) return {static_cast<uint16_t>(u >> 16 | 0x40)};
  return {static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
}

template <>
f16 from_float<f16>(float x) {
  const _Float16 h = static_cast<_Float16>(x);
  f16 result;
  std::memcpy(&result.bits, &h, 2);
  return result;
}

namespace {

struct Fragment {
  uint32_t r[4];
};

uint16_t element(const void* row, int i) { return static_cast<const uint16_t*>(row)[i]; }

template <class T>
struct MmaIn {
  uint32_t a[4], b[2];
};

}  // namespace

void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const Fragment f = emu::exchange<const void*, Fragment>(row, [](int lane, auto get) {
    Fragment out;
    for (int tile = 0; tile < 4; ++tile) {
      const void* from = get(tile * 8 + lane / 4);
      out.r[tile] = element(from, lane % 4 * 2) | uint32_t(element(from, lane % 4 * 2 + 1)) << 16;
    }
    return out;
  });
  std::memcpy(r, f.r, sizeof(r));
}

void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const Fragment f = emu::exchange<const void*, Fragment>(row, [](int lane, auto get) {
    Fragment out;
    for (int tile = 0; tile < 4; ++tile) {
      const int first = tile * 8 + lane % 4 * 2;
      out.r[tile] = element(get(first), lane / 4) | uint32_t(element(get(first + 1), lane / 4)) << 16;
    }
    return out;
  });
  std::memcpy(r, f.r, sizeof(r));
}

// The fragments' places are those of the PTX manual for mma.m16n8k16: a's register i holds row group + 8 * (i & 1) and
// columns 2 * (lane % 4) + 8 * (i / 2); b's register i holds rows 2 * (lane % 4) + 8 * i of column group.
template <class T>
void mma_16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Data {
    const uint32_t* a;
    uint32_t b[2];
    float* d;
  } data{a, {b0, b1}, d};
  emu::warp_collective(
      [](void* const(&lanes)[emu::kWarp]) {
        const auto half = [](uint32_t word, int which) { return to_float(T{uint16_t(word >> (16 * which))}); };
        float left[16][16], right[8][16];
        for (int lane = 0; lane < emu::kWarp; ++lane) {
          const Data& own = *static_cast<const Data*>(lanes[lane]);
          for (int w = 0; w < 2; ++w) {
            for (int i = 0; i < 4; ++i) {
              left[lane / 4 + 8 * (i & 1)][lane % 4 * 2 + 8 * (i / 2) + w] = half(own.a[i], w);
            }
            for (int i = 0; i < 2; ++i) right[lane / 4][lane % 4 * 2 + 8 * i + w] = half(own.b[i], w);
          }
        }
        for (int lane = 0; lane < emu::kWarp; ++lane) {
          float* out = static_cast<const Data*>(lanes[lane])->d;
          for (int i = 0; i < 4; ++i) {
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += left[lane / 4 + 8 * (i / 2)][k] * right[lane % 4 * 2 + (i & 1)][k];
            out[i] += sum;
          }
        }
      },
      &data);
}

template void mma_16816<bf16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);
template void mma_16816<f16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t);

}  // namespace medusa::cuda
