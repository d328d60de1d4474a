#pragma once

#include <string>

#include "absl/status/status.h"

namespace nestor {

// Turns a model in llama2.c's legacy format (seven int32, then fp32 weights; a tokenizer of scored
// pieces) into a Hugging Face directory at `output`.
absl::Status ImportLlama2c(const std::string& model_path, const std::string& tokenizer_path,
                           const std::string& output);

}  // namespace nestor
