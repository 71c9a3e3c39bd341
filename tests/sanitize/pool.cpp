// The pool's own races: callers from several threads at once, while another changes the number of threads.
#include <atomic>
#include <chrono>
#include <thread>

#include "check.h"
#include "cpu/ops.h"

namespace medusa::sanitize {

int race() {
  constexpr int kIn = 256, kOut = 2048;
  Random random(1);
  const Buffer weight = random.values(DType::f32, kIn * kOut);
  std::atomic<int> wrong{0};
  std::atomic<bool> over{false};
  const auto call = [&](int rows) {
    const Buffer x = Random(rows).values(DType::f32, rows * kIn);
    const auto launch = [&] {
      Buffer out(rows * kOut * sizeof(float));
      cpu::linear({x.data(), weight.data(), nullptr, nullptr, out.data(), kIn, 0, kOut, rows, kIn, kOut, DType::f32,
                   DType::f32, WeightFormat::plain_f32});
      return out;
    };
    const Buffer first = launch();
    for (int i = 0; i < 40; ++i) wrong += !(launch() == first);
  };
  std::thread resizer([&] {
    for (int i = 0; !over; ++i) {
      cpu::set_num_threads(1 + i % 4);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  });
  std::thread few(call, 1), more(call, 9);
  call(5);
  few.join();
  more.join();
  over = true;
  resizer.join();
  return wrong;
}

}  // namespace medusa::sanitize
