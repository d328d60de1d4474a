#pragma once

#include <string>

#include "absl/status/status.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {

// Compresses a tiny Llama checkpoint of random weights into `directory`/nested: residual levels up
// to rank 16, prefix levels and the full one. `directory` exists; what else lies there is the
// source.
absl::Status WriteTinyNestedModel(const std::string& directory,
                                  const TinyCheckpointOptions& options = {});

}  // namespace nestor
