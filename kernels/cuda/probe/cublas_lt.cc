#include "kernels/cuda/probe/cublas_lt.h"

#include <dlfcn.h>

namespace nestor::probe {
namespace {

// What NVIDIA recommends for Hopper.
constexpr int64_t kWorkspaceBytes = 32 << 20;
constexpr const char* kLibrary = "libcublasLt.so.13";

template <typename Function>
bool Load(void* library, const char* name, Function* function, std::string* error) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function == nullptr) *error = std::string(kLibrary) + " has no " + name;
  return *function != nullptr;
}

}  // namespace

std::unique_ptr<CublasLt> CublasLt::Open(std::string* error) {
  std::unique_ptr<CublasLt> lt(new CublasLt());
  lt->library_ = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (lt->library_ == nullptr) {
    *error = dlerror();
    const std::string path = std::string(NESTOR_CUDA_LIBRARY_DIR "/") + kLibrary;
    lt->library_ = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  }
  if (lt->library_ == nullptr) return nullptr;
  void* library = lt->library_;
  const bool loaded =
      Load(library, "cublasLtCreate", &lt->Create, error) &&
      Load(library, "cublasLtDestroy", &lt->Destroy, error) &&
      Load(library, "cublasLtGetVersion", &lt->GetVersion, error) &&
      Load(library, "cublasLtMatmulDescCreate", &lt->MatmulDescCreate, error) &&
      Load(library, "cublasLtMatmulDescDestroy", &lt->MatmulDescDestroy, error) &&
      Load(library, "cublasLtMatmulDescSetAttribute", &lt->MatmulDescSetAttribute, error) &&
      Load(library, "cublasLtMatrixLayoutCreate", &lt->MatrixLayoutCreate, error) &&
      Load(library, "cublasLtMatrixLayoutDestroy", &lt->MatrixLayoutDestroy, error) &&
      Load(library, "cublasLtMatmulPreferenceCreate", &lt->MatmulPreferenceCreate, error) &&
      Load(library, "cublasLtMatmulPreferenceDestroy", &lt->MatmulPreferenceDestroy, error) &&
      Load(library, "cublasLtMatmulPreferenceSetAttribute", &lt->MatmulPreferenceSetAttribute,
           error) &&
      Load(library, "cublasLtMatmulAlgoGetHeuristic", &lt->MatmulAlgoGetHeuristic, error) &&
      Load(library, "cublasLtMatmul", &lt->Matmul, error);
  if (!loaded) return nullptr;
  const cublasStatus_t status = lt->Create(&lt->handle_);
  if (status != CUBLAS_STATUS_SUCCESS) {
    *error = "cublasLtCreate: status " + std::to_string(status);
    return nullptr;
  }
  lt->workspace_ = DeviceBuffer<char>(kWorkspaceBytes);
  return lt;
}

CublasLt::~CublasLt() {
  if (handle_ != nullptr) Destroy(handle_);
  if (library_ != nullptr) dlclose(library_);
}

void Check(cublasStatus_t status, const char* file, int line) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  Fail(std::string(file) + ":" + std::to_string(line) + ": cublasLt status " +
       std::to_string(status));
}

}  // namespace nestor::probe
