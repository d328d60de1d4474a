#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace nestor {

// Shapes of a checkpoint with random weights. The defaults are odd on purpose: no multiple of a
// panel or a quantisation group where the architecture allows it.
struct TinyCheckpointOptions {
  int64_t num_blocks = 2;
  int64_t hidden = 72;
  int64_t num_heads = 6;
  int64_t num_kv_heads = 2;  // Llama only
  int64_t mlp_size = 100;
  int64_t context_length = 256;
  bool tied_head = true;  // Llama only
  // Llama only: every 32nd input of a down projection is so many times larger, and its weights so
  // many times smaller, which changes nothing but what an input's neighbours in a group round to.
  float outlier = 1;
  bool stores_bf16 = false;
  uint64_t seed = 1;
};

// Writes a Llama checkpoint in Hugging Face's layout into `directory` (made where absent): random
// weights, a byte-level BPE tokenizer of 256 bytes and two special tokens, a ChatML template.
absl::Status WriteTinyLlama(const std::string& directory,
                            const TinyCheckpointOptions& options = {});

// The same for a BERT encoder with a WordPiece tokenizer of single characters, mean pooling.
absl::Status WriteTinyBert(const std::string& directory, const TinyCheckpointOptions& options = {});

}  // namespace nestor
