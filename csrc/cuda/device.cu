#include <cuda_runtime.h>

#include "cuda/ops.h"

namespace medusa::cuda {

int device_count(std::string* reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    *reason = cudaGetErrorString(error);
    cudaGetLastError();  // the error would otherwise surface at the next launch
    return 0;
  }
  *reason = count ? "" : "the driver reports no device";
  return count;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace medusa::cuda
