#include "kernels/cuda/probe/cuda_check.h"

#include <cstdio>
#include <cstdlib>

namespace nestor::probe {

void Fail(const std::string& message) {
  std::fflush(stdout);
  std::fprintf(stderr, "gpu_probe: %s\n", message.c_str());
  // No destructors: after a CUDA error they would only add errors of their own.
  std::_Exit(1);
}

void Check(cudaError_t error, const char* file, int line) {
  if (error == cudaSuccess) return;
  Fail(std::string(file) + ":" + std::to_string(line) + ": " + cudaGetErrorName(error) + ": " +
       cudaGetErrorString(error));
}

}  // namespace nestor::probe
