#pragma once

#include <memory>

#include "kernels/backend.h"

namespace nestor {

struct ReferenceOptions {
  // Round the input of plane and factor layers to int8 in groups of 32 as the CPU's kernels do (up
  // to 16 rows, or always with AVX-512), so that little remains between the two. Layers with
  // float_activations are left as they are.
  bool quantises_activations = false;
};

// Every operation as plain loops in double precision, straight from the stored weights. Slow; the
// truth that tests compare with.
std::unique_ptr<Backend> MakeReferenceBackend(const ReferenceOptions& options = {});

}  // namespace nestor
