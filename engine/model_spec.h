#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace nestor {

// Where a linear layer stands in a block; the order is that of LayersOf.
enum class LinearRole : uint8_t { kQuery, kKey, kValue, kAttentionOut, kGate, kUp, kDown, kHead };

// Where a source checkpoint keeps a layer's weight and bias: outputs [first_output, first_output +
// out) of tensors that may hold several layers.
struct SourceTensor {
  std::string name;         // without ".weight" and ".bias"
  int64_t num_outputs = 0;  // of the whole tensor
  int64_t first_output = 0;
  bool is_transposed = false;  // weights [in, num_outputs] instead of [num_outputs, in]
};

struct LinearSpec {
  std::string name;  // in artifacts and messages; the source tensor's where that holds no other
  LinearRole role = LinearRole::kHead;
  int32_t block = -1;  // -1: the head
  int64_t out = 0;
  int64_t in = 0;
  bool has_bias = false;
  SourceTensor source;
};

struct EmbeddingNames {
  // Full tensor names.
  std::string token;
  std::string position;  // empty: none
  std::string type;      // empty: none
  std::string norm;      // without ".weight"; empty: none
};

// Names of a block's tensors without ".weight" and ".bias"; "{}" stands for the block's number.
struct BlockNames {
  std::string query, key, value, attention_out, gate, up, down;  // gate empty: not gated
  std::string attention_norm, mlp_norm;
  // Of every head, before the rotation (Qwen3); empty: none.
  std::string query_norm = {}, key_norm = {};
};

// How RoPE's frequencies are lowered for contexts longer than those of pretraining. One that turns
// `t` times in `original_context` positions is kept where t >= high_frequency_factor, divided by
// `factor` where t <= low_frequency_factor, interpolated between them (Llama 3.1). The linear kind
// (2306.15595) divides all: its `original_context` is 0.
struct RopeScaling {
  double factor = 1;
  double original_context = 0;
  double low_frequency_factor = 0;
  double high_frequency_factor = 1;
};

// The head of a sequence classifier (engine/classifier.h).
struct ClassifierSpec {
  // Names of its layers without ".weight" and ".bias".
  std::string pooler, output;
  std::vector<std::string> labels;  // by class; empty: the model is no classifier
};

// A transformer described by data: what config.json says, in the engine's own terms. New
// architectures are new ways to fill this in (model_spec.cc), not new classes.
struct ModelSpec {
  std::string architecture;  // as config.json names it: "LlamaForCausalLM"
  int64_t num_blocks = 0;
  int64_t hidden = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t mlp_size = 0;
  int64_t vocabulary = 0;
  int64_t context_length = 0;  // positions the model can address

  NormKind norm = NormKind::kRms;
  float norm_epsilon = 0;
  bool norms_after = false;  // post-LayerNorm (BERT): norm(x + f(x)), no final norm
  ActivationKind activation = ActivationKind::kSilu;
  bool causal = true;  // false: an encoder, which has no KV cache and no head
  bool has_qkv_bias = false;
  bool has_attention_out_bias = false;
  bool has_mlp_bias = false;
  double rope_theta = 0;  // 0: learned positions
  RopeScaling rope_scaling;
  bool tied_head = false;
  std::string final_norm;  // without ".weight", like the blocks' norms; empty: none
  std::string head;        // without ".weight"; a tied head is named like the token embedding
  EmbeddingNames embeddings;
  BlockNames names;

  // How a source checkpoint stores the blocks' layers, where not each as one [out, in] tensor.
  std::string fused_qkv;           // a tensor of q, k and v, one after the other; empty: three
  bool stores_transposed = false;  // [in, out] (GPT-2's Conv1D)
  std::string optional_prefix;     // that all its tensor names may have, or none

  // Encoders, from sentence-transformers' files beside the checkpoint.
  PoolingKind pooling = PoolingKind::kMean;
  bool normalises_embedding = true;
  int64_t num_token_types = 0;  // 2 and more: a second text can be told apart from the first
  ClassifierSpec classifier;

  std::vector<int32_t> end_tokens;  // generation stops at any of them

  bool is_encoder() const { return !causal; }
  bool is_classifier() const { return !classifier.labels.empty(); }
  // Values that an encoder yields for a text: its embedding, or a logit for each label.
  int64_t output_size() const {
    return is_classifier() ? static_cast<int64_t>(classifier.labels.size()) : hidden;
  }
};

// Reads config.json (as transformers 4 and 5 write it), generation_config.json and the pooling
// files of a Hugging Face directory. INVALID_ARGUMENT names the file, the key and the value;
// UNIMPLEMENTED an architecture or a variant that is not supported.
absl::StatusOr<ModelSpec> ReadModelSpec(const std::string& directory);

// Every linear layer in the order in which profiles list them: block by block, by role, then the
// head.
std::vector<LinearSpec> LayersOf(const ModelSpec& spec);

// The tensor name of a block: "{}" replaced by `block`.
std::string NameInBlock(const std::string& pattern, int64_t block);

// FLOPs of attention for one token at `context` positions: q k^T and the weighted sum of v.
int64_t AttentionFlops(const ModelSpec& spec, int64_t context);

}  // namespace nestor
