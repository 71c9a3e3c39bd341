// Runs every CPU kernel that this processor has under the sanitizer it was built with, by 1, 2 and 4 threads, and says
// whether they agree.
#include <cstdio>
#include <stdexcept>

#include "check.h"
#include "cpu/ops.h"

int main() {
  using namespace medusa;
  constexpr uint32_t kSeeds = 3;
  int wrong = 0;
  for (const char* isa : {"avx512", "avx2", "portable"}) {
    try {
      cpu::force_isa(isa);
    } catch (const std::invalid_argument&) {
      std::printf("%s: not in this build or this processor\n", isa);
      continue;
    }
    int launches = 0;
    for (uint32_t seed = 1; seed <= kSeeds; ++seed) {
      cpu::set_num_threads(1);
      const sanitize::Outputs expected = sanitize::launch_everything(seed);
      for (const int threads : {2, 4}) {
        cpu::set_num_threads(threads);
        wrong += !(sanitize::launch_everything(seed) == expected);
        launches += static_cast<int>(expected.size());
      }
    }
    wrong += sanitize::race();
    std::printf("%s: %d outputs compared, %d wrong\n", isa, launches, wrong);
  }
  return wrong != 0;
}
