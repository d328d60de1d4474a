#pragma once

#include <cublasLt.h>

#include <memory>
#include <string>

#include "kernels/cuda/probe/cuda_check.h"

namespace nestor::probe {

// cublasLt, opened with dlopen so that the program starts on machines that lack it. Not
// thread-safe: one workspace serves every product, so products run on one stream.
class CublasLt {
 public:
  // Null where the library or one of its functions is missing; `error` says which.
  static std::unique_ptr<CublasLt> Open(std::string* error);
  ~CublasLt();
  CublasLt(const CublasLt&) = delete;

  cublasLtHandle_t handle() const { return handle_; }
  void* workspace() const { return workspace_.data(); }
  size_t workspace_bytes() const { return workspace_.bytes(); }
  int64_t version() const { return static_cast<int64_t>(GetVersion()); }

  decltype(&cublasLtCreate) Create = nullptr;
  decltype(&cublasLtDestroy) Destroy = nullptr;
  decltype(&cublasLtGetVersion) GetVersion = nullptr;
  decltype(&cublasLtMatmulDescCreate) MatmulDescCreate = nullptr;
  decltype(&cublasLtMatmulDescDestroy) MatmulDescDestroy = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) MatmulDescSetAttribute = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) MatrixLayoutCreate = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) MatrixLayoutDestroy = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) MatmulPreferenceCreate = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) MatmulPreferenceDestroy = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) MatmulPreferenceSetAttribute = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) MatmulAlgoGetHeuristic = nullptr;
  decltype(&cublasLtMatmul) Matmul = nullptr;

 private:
  CublasLt() = default;

  void* library_ = nullptr;
  cublasLtHandle_t handle_ = nullptr;
  DeviceBuffer<char> workspace_;
};

// Fails unless `status` is success.
void Check(cublasStatus_t status, const char* file = __builtin_FILE(), int line = __builtin_LINE());

}  // namespace nestor::probe
