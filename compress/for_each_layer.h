#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/model_spec.h"

namespace nestor {

// Calls `function` with the index of every layer, on `threads` threads at a time, the largest
// layers first; OpenBLAS's own threads are off meanwhile. Blocks. Returns the first failure, after
// which no thread takes another layer. `label` is that of the progress on stderr. REQUIRES: threads
// > 0; `function` may run on several layers at once.
absl::Status ForEachLayer(const std::vector<LinearSpec>& layers, int threads,
                          const std::string& label,
                          const std::function<absl::Status(size_t)>& function);

}  // namespace nestor
