// What the sanitized program is made of: buffers of the exact size that an op may touch, and the two rounds it runs.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "params.h"

namespace medusa::sanitize {

inline int element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Heap memory without slack: a byte read or written past its end is an error that AddressSanitizer sees.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : data_(nullptr, &std::free), bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 64, bytes)) throw std::bad_alloc();
    data_.reset(memory);
    std::memset(memory, 0xff, bytes);  // NaN in every float type
  }
  template <class T>
  T* at(size_t index = 0) const {
    return static_cast<T*>(data_.get()) + index;
  }
  void* data() const { return data_.get(); }
  bool operator==(const Buffer& other) const {
    return bytes_ == other.bytes_ && std::memcmp(data(), other.data(), bytes_) == 0;
  }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_;
  size_t bytes_;
};

// Random values of either sign and a magnitude between 1/8 and 1, from one seed.
class Random {
 public:
  explicit Random(uint32_t seed) : bits_(seed) {}

  uint32_t below(uint32_t limit) { return bits_() % limit; }

  Buffer values(DType dtype, size_t count) {
    Buffer made(count * element_size(dtype));
    for (size_t i = 0; i < count; ++i) {
      const uint32_t sign = below(2), exponent = below(3), fraction = bits_();
      if (dtype == DType::f32) made.at<uint32_t>()[i] = sign << 31 | (124 + exponent) << 23 | (fraction & 0x7fffff);
      if (dtype == DType::bf16) made.at<uint16_t>()[i] = sign << 15 | (124 + exponent) << 7 | (fraction & 0x7f);
      if (dtype == DType::f16) made.at<uint16_t>()[i] = sign << 15 | (12 + exponent) << 10 | (fraction & 0x3ff);
    }
    return made;
  }

 private:
  std::mt19937 bits_;
};

// The outputs of one launch, to compare bit for bit.
using Outputs = std::vector<Buffer>;

// One launch of every op, over shapes and dtypes that `seed` picks; the same seed has the same outputs.
Outputs launch_everything(uint32_t seed);

// Callers from several threads, and a pool that changes its size under them. Returns the number of wrong results.
int race();

}  // namespace medusa::sanitize
