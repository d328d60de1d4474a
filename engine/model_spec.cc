#include "engine/model_spec.h"

#include <algorithm>
#include <filesystem>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using Json = nlohmann::json;

// A JSON file whose keys are read with messages that name the file and the key.
class ConfigFile {
 public:
  static absl::StatusOr<ConfigFile> Open(const std::string& path) {
    NESTOR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
    ConfigFile file;
    file.path_ = path;
    file.json_ = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (file.json_.is_discarded()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": no valid JSON"));
    }
    return file;
  }

  const Json& json() const { return json_; }

  bool Has(const char* key) const {
    return json_.is_object() && json_.contains(key) && !json_[key].is_null();
  }

  // The object under `key`, whose own keys messages name as "key.of_its_own".
  absl::StatusOr<ConfigFile> Section(const char* key) const {
    if (!Has(key) || !json_[key].is_object()) return Error(key, "expected an object");
    ConfigFile section;
    section.path_ = path_;
    section.prefix_ = absl::StrCat(prefix_, key, ".");
    section.json_ = json_[key];
    return section;
  }

  absl::StatusOr<int64_t> Count(const char* key) const {
    constexpr int64_t kLargest = int64_t{1} << 32;
    if (!Has(key) || !json_[key].is_number_integer() || json_[key].get<int64_t>() <= 0 ||
        json_[key].get<int64_t>() > kLargest) {
      return Error(key, "expected a positive integer");
    }
    return json_[key].get<int64_t>();
  }
  absl::StatusOr<int64_t> CountOr(const char* key, int64_t fallback) const {
    return Has(key) ? Count(key) : fallback;
  }

  absl::StatusOr<double> Positive(const char* key) const {
    if (!Has(key) || !json_[key].is_number() || !(json_[key].get<double>() > 0)) {
      return Error(key, "expected a positive number");
    }
    return json_[key].get<double>();
  }

  absl::StatusOr<bool> BoolOr(const char* key, bool fallback) const {
    if (!Has(key)) return fallback;
    if (!json_[key].is_boolean()) return Error(key, "expected true or false");
    return json_[key].get<bool>();
  }

  absl::StatusOr<std::string> StringOr(const char* key, const std::string& fallback) const {
    if (!Has(key)) return fallback;
    if (!json_[key].is_string()) return Error(key, "expected a string");
    return json_[key].get<std::string>();
  }

  absl::Status Error(const char* key, const std::string& expected) const {
    return absl::InvalidArgumentError(absl::StrCat(path_, ": ", prefix_, key, ": ", expected,
                                                   "; was ",
                                                   Has(key) ? json_[key].dump() : "absent"));
  }
  absl::Status NotSupported(const char* key, const std::string& supported) const {
    return absl::UnimplementedError(absl::StrCat(path_, ": ", prefix_, key, ": ", json_[key].dump(),
                                                 " is not supported (supported: ", supported, ")"));
  }

 private:
  std::string path_;
  std::string prefix_;  // of keys in messages
  Json json_;
};

absl::StatusOr<ActivationKind> ReadActivation(const ConfigFile& config, const char* key,
                                              const std::string& fallback = "") {
  NESTOR_ASSIGN_OR_RETURN(const std::string name, config.StringOr(key, fallback));
  if (name == "silu" || name == "swish") return ActivationKind::kSilu;
  if (name == "gelu") return ActivationKind::kGeluErf;
  if (name == "gelu_new" || name == "gelu_pytorch_tanh") return ActivationKind::kGeluTanh;
  if (name.empty()) return config.Error(key, "expected a string");
  return config.NotSupported(key, "silu, gelu, gelu_new, gelu_pytorch_tanh");
}

// Llama 3.1's, as transformers' modeling_rope_utils.py computes it.
absl::Status ReadLlama3Scaling(const ConfigFile& rope, RopeScaling* scaling) {
  NESTOR_ASSIGN_OR_RETURN(scaling->low_frequency_factor, rope.Positive("low_freq_factor"));
  NESTOR_ASSIGN_OR_RETURN(scaling->high_frequency_factor, rope.Positive("high_freq_factor"));
  if (scaling->high_frequency_factor <= scaling->low_frequency_factor) {
    return rope.Error("high_freq_factor", absl::StrCat("expected more than low_freq_factor (",
                                                       scaling->low_frequency_factor, ")"));
  }
  NESTOR_ASSIGN_OR_RETURN(const int64_t context, rope.Count("original_max_position_embeddings"));
  scaling->original_context = static_cast<double>(context);
  return absl::OkStatus();
}

// transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters.
absl::Status ReadRope(const ConfigFile& config, ModelSpec* spec) {
  if (spec->head_dim % 2 != 0) return config.Error("head_dim", "expected an even number");
  spec->rope_theta = 10000;
  if (config.Has("rope_theta")) {
    NESTOR_ASSIGN_OR_RETURN(spec->rope_theta, config.Positive("rope_theta"));
  }
  const char* key = config.Has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  if (!config.Has(key)) return absl::OkStatus();
  NESTOR_ASSIGN_OR_RETURN(const ConfigFile rope, config.Section(key));
  if (rope.Has("rope_theta")) {
    NESTOR_ASSIGN_OR_RETURN(spec->rope_theta, rope.Positive("rope_theta"));
  }
  const char* type_key = rope.Has("rope_type") ? "rope_type" : "type";
  NESTOR_ASSIGN_OR_RETURN(const std::string type, rope.StringOr(type_key, "default"));
  if (type == "default") return absl::OkStatus();
  if (type != "linear" && type != "llama3") {
    return rope.NotSupported(type_key, "default, linear, llama3");
  }
  NESTOR_ASSIGN_OR_RETURN(spec->rope_scaling.factor, rope.Positive("factor"));
  return type == "llama3" ? ReadLlama3Scaling(rope, &spec->rope_scaling) : absl::OkStatus();
}

absl::Status CheckHeads(const ConfigFile& config, const ModelSpec& spec) {
  if (spec.num_heads % spec.num_kv_heads == 0) return absl::OkStatus();
  return config.Error(
      "num_key_value_heads",
      absl::StrCat("expected a divisor of num_attention_heads (", spec.num_heads, ")"));
}

absl::Status ReadShape(const ConfigFile& config, ModelSpec* spec) {
  NESTOR_ASSIGN_OR_RETURN(spec->num_blocks, config.Count("num_hidden_layers"));
  NESTOR_ASSIGN_OR_RETURN(spec->hidden, config.Count("hidden_size"));
  NESTOR_ASSIGN_OR_RETURN(spec->num_heads, config.Count("num_attention_heads"));
  NESTOR_ASSIGN_OR_RETURN(spec->num_kv_heads,
                          config.CountOr("num_key_value_heads", spec->num_heads));
  if (!config.Has("head_dim") && spec->hidden % spec->num_heads != 0) {
    return config.Error("num_attention_heads",
                        absl::StrCat("expected a divisor of hidden_size (", spec->hidden, ")"));
  }
  NESTOR_ASSIGN_OR_RETURN(spec->head_dim,
                          config.CountOr("head_dim", spec->hidden / spec->num_heads));
  NESTOR_ASSIGN_OR_RETURN(spec->mlp_size, config.Count("intermediate_size"));
  NESTOR_ASSIGN_OR_RETURN(spec->vocabulary, config.Count("vocab_size"));
  NESTOR_ASSIGN_OR_RETURN(spec->context_length, config.Count("max_position_embeddings"));
  NESTOR_ASSIGN_OR_RETURN(spec->activation, ReadActivation(config, "hidden_act"));
  return CheckHeads(config, *spec);
}

// What Llama and the families built like it share; each adds its biases and norms.
absl::StatusOr<ModelSpec> ReadLlamaLike(const ConfigFile& config) {
  ModelSpec spec;
  NESTOR_RETURN_IF_ERROR(ReadShape(config, &spec));
  spec.norm = NormKind::kRms;
  NESTOR_ASSIGN_OR_RETURN(const double epsilon, config.Positive("rms_norm_eps"));
  spec.norm_epsilon = static_cast<float>(epsilon);
  NESTOR_RETURN_IF_ERROR(ReadRope(config, &spec));
  NESTOR_ASSIGN_OR_RETURN(spec.tied_head, config.BoolOr("tie_word_embeddings", false));
  spec.embeddings.token = "model.embed_tokens.weight";
  spec.head = spec.tied_head ? "model.embed_tokens" : "lm_head";
  spec.final_norm = "model.norm";
  spec.names = {.query = "model.layers.{}.self_attn.q_proj",
                .key = "model.layers.{}.self_attn.k_proj",
                .value = "model.layers.{}.self_attn.v_proj",
                .attention_out = "model.layers.{}.self_attn.o_proj",
                .gate = "model.layers.{}.mlp.gate_proj",
                .up = "model.layers.{}.mlp.up_proj",
                .down = "model.layers.{}.mlp.down_proj",
                .attention_norm = "model.layers.{}.input_layernorm",
                .mlp_norm = "model.layers.{}.post_attention_layernorm"};
  return spec;
}

absl::Status ReadAttentionBias(const ConfigFile& config, ModelSpec* spec) {
  NESTOR_ASSIGN_OR_RETURN(const bool has_bias, config.BoolOr("attention_bias", false));
  spec->has_qkv_bias = has_bias;
  spec->has_attention_out_bias = has_bias;
  return absl::OkStatus();
}

absl::StatusOr<ModelSpec> ReadLlama(const ConfigFile& config) {
  NESTOR_ASSIGN_OR_RETURN(ModelSpec spec, ReadLlamaLike(config));
  NESTOR_RETURN_IF_ERROR(ReadAttentionBias(config, &spec));
  NESTOR_ASSIGN_OR_RETURN(spec.has_mlp_bias, config.BoolOr("mlp_bias", false));
  return spec;
}

// UNIMPLEMENTED where `key` has the other value; an absent one is as `supported`.
absl::Status Require(const ConfigFile& config, const char* key, bool supported) {
  NESTOR_ASSIGN_OR_RETURN(const bool value, config.BoolOr(key, supported));
  return value == supported ? absl::OkStatus()
                            : config.NotSupported(key, supported ? "true" : "false");
}

absl::StatusOr<ModelSpec> ReadQwen2(const ConfigFile& config) {
  NESTOR_RETURN_IF_ERROR(Require(config, "use_sliding_window", false));
  NESTOR_ASSIGN_OR_RETURN(ModelSpec spec, ReadLlamaLike(config));
  spec.has_qkv_bias = true;
  return spec;
}

absl::StatusOr<ModelSpec> ReadQwen3(const ConfigFile& config) {
  NESTOR_RETURN_IF_ERROR(Require(config, "use_sliding_window", false));
  // The family's default is no share of hidden_size, so a missing key is an error.
  NESTOR_RETURN_IF_ERROR(config.Count("head_dim").status());
  NESTOR_ASSIGN_OR_RETURN(ModelSpec spec, ReadLlamaLike(config));
  NESTOR_RETURN_IF_ERROR(ReadAttentionBias(config, &spec));
  spec.names.query_norm = "model.layers.{}.self_attn.q_norm";
  spec.names.key_norm = "model.layers.{}.self_attn.k_norm";
  return spec;
}

absl::Status ReadGpt2Shape(const ConfigFile& config, ModelSpec* spec) {
  NESTOR_ASSIGN_OR_RETURN(spec->num_blocks, config.Count("n_layer"));
  NESTOR_ASSIGN_OR_RETURN(spec->hidden, config.Count("n_embd"));
  NESTOR_ASSIGN_OR_RETURN(spec->num_heads, config.Count("n_head"));
  if (spec->hidden % spec->num_heads != 0) {
    return config.Error("n_head",
                        absl::StrCat("expected a divisor of n_embd (", spec->hidden, ")"));
  }
  spec->num_kv_heads = spec->num_heads;
  spec->head_dim = spec->hidden / spec->num_heads;
  NESTOR_ASSIGN_OR_RETURN(spec->mlp_size, config.CountOr("n_inner", 4 * spec->hidden));
  NESTOR_ASSIGN_OR_RETURN(spec->vocabulary, config.Count("vocab_size"));
  const char* context_key =
      config.Has("n_ctx") && !config.Has("n_positions") ? "n_ctx" : "n_positions";
  NESTOR_ASSIGN_OR_RETURN(spec->context_length, config.Count(context_key));
  NESTOR_ASSIGN_OR_RETURN(spec->activation,
                          ReadActivation(config, "activation_function", "gelu_new"));
  return absl::OkStatus();
}

absl::StatusOr<ModelSpec> ReadGpt2(const ConfigFile& config) {
  // reorder_and_upcast_attn may be either: it changes only where attention rounds.
  NESTOR_RETURN_IF_ERROR(Require(config, "scale_attn_weights", true));
  NESTOR_RETURN_IF_ERROR(Require(config, "scale_attn_by_inverse_layer_idx", false));
  NESTOR_RETURN_IF_ERROR(Require(config, "add_cross_attention", false));
  ModelSpec spec;
  NESTOR_RETURN_IF_ERROR(ReadGpt2Shape(config, &spec));
  spec.norm = NormKind::kLayerNorm;
  NESTOR_ASSIGN_OR_RETURN(const double epsilon, config.Positive("layer_norm_epsilon"));
  spec.norm_epsilon = static_cast<float>(epsilon);
  spec.has_qkv_bias = true;
  spec.has_attention_out_bias = true;
  spec.has_mlp_bias = true;
  NESTOR_ASSIGN_OR_RETURN(spec.tied_head, config.BoolOr("tie_word_embeddings", true));
  spec.embeddings = {.token = "wte.weight", .position = "wpe.weight", .type = "", .norm = ""};
  spec.head = spec.tied_head ? "wte" : "lm_head";
  spec.final_norm = "ln_f";
  spec.names = {.query = "h.{}.attn.c_attn.query",
                .key = "h.{}.attn.c_attn.key",
                .value = "h.{}.attn.c_attn.value",
                .attention_out = "h.{}.attn.c_proj",
                .gate = "",
                .up = "h.{}.mlp.c_fc",
                .down = "h.{}.mlp.c_proj",
                .attention_norm = "h.{}.ln_1",
                .mlp_norm = "h.{}.ln_2"};
  spec.fused_qkv = "h.{}.attn.c_attn";
  spec.stores_transposed = true;
  spec.optional_prefix = "transformer.";
  return spec;
}

absl::StatusOr<ModelSpec> ReadBert(const ConfigFile& config) {
  ModelSpec spec;
  NESTOR_RETURN_IF_ERROR(ReadShape(config, &spec));
  NESTOR_ASSIGN_OR_RETURN(const std::string positions,
                          config.StringOr("position_embedding_type", "absolute"));
  if (positions != "absolute") return config.NotSupported("position_embedding_type", "absolute");
  spec.norm = NormKind::kLayerNorm;
  NESTOR_ASSIGN_OR_RETURN(const double epsilon, config.Positive("layer_norm_eps"));
  spec.norm_epsilon = static_cast<float>(epsilon);
  spec.norms_after = true;
  spec.causal = false;
  spec.has_qkv_bias = true;
  spec.has_attention_out_bias = true;
  spec.has_mlp_bias = true;
  NESTOR_ASSIGN_OR_RETURN(spec.num_token_types, config.CountOr("type_vocab_size", 2));
  spec.embeddings = {.token = "embeddings.word_embeddings.weight",
                     .position = "embeddings.position_embeddings.weight",
                     .type = "embeddings.token_type_embeddings.weight",
                     .norm = "embeddings.LayerNorm"};
  spec.names = {.query = "encoder.layer.{}.attention.self.query",
                .key = "encoder.layer.{}.attention.self.key",
                .value = "encoder.layer.{}.attention.self.value",
                .attention_out = "encoder.layer.{}.attention.output.dense",
                .gate = "",
                .up = "encoder.layer.{}.intermediate.dense",
                .down = "encoder.layer.{}.output.dense",
                .attention_norm = "encoder.layer.{}.attention.output.LayerNorm",
                .mlp_norm = "encoder.layer.{}.output.LayerNorm"};
  return spec;
}

// The names of the classes, by number; without any there are two, as in transformers.
absl::StatusOr<std::vector<std::string>> ReadLabels(const ConfigFile& config) {
  if (!config.Has("id2label")) return std::vector<std::string>{"LABEL_0", "LABEL_1"};
  NESTOR_ASSIGN_OR_RETURN(const ConfigFile names, config.Section("id2label"));
  std::vector<std::string> labels;
  for (size_t i = 0; i < names.json().size(); ++i) {
    const std::string number = absl::StrCat(i);
    NESTOR_ASSIGN_OR_RETURN(labels.emplace_back(), names.StringOr(number.c_str(), ""));
    if (labels.back().empty()) return names.Error(number.c_str(), "expected the label's name");
  }
  return labels;
}

absl::StatusOr<ModelSpec> ReadBertClassifier(const ConfigFile& config) {
  NESTOR_ASSIGN_OR_RETURN(ModelSpec spec, ReadBert(config));
  NESTOR_ASSIGN_OR_RETURN(const std::string problem,
                          config.StringOr("problem_type", "single_label_classification"));
  if (problem != "single_label_classification") {
    return config.NotSupported("problem_type", "single_label_classification");
  }
  spec.pooling = PoolingKind::kCls;
  spec.normalises_embedding = false;
  spec.optional_prefix = "bert.";
  spec.classifier = {.pooler = "pooler.dense", .output = "classifier", .labels = {}};
  NESTOR_ASSIGN_OR_RETURN(spec.classifier.labels, ReadLabels(config));
  // One label is a regression.
  if (spec.classifier.labels.size() < 2)
    return config.NotSupported("id2label", "two labels or more");
  return spec;
}

// modules.json lists the stages behind the transformer; without it an encoder is pooled by mean
// and normalised, as sentence-transformers does with a bare checkpoint.
absl::Status ReadPooling(const std::string& directory, ModelSpec* spec) {
  const std::string modules_path = directory + "/modules.json";
  if (std::filesystem::exists(modules_path)) {
    NESTOR_ASSIGN_OR_RETURN(const ConfigFile modules, ConfigFile::Open(modules_path));
    spec->normalises_embedding = modules.json().dump().find("Normalize") != std::string::npos;
  }
  const std::string pooling_path = directory + "/1_Pooling/config.json";
  if (std::filesystem::exists(pooling_path)) {
    NESTOR_ASSIGN_OR_RETURN(const ConfigFile pooling, ConfigFile::Open(pooling_path));
    NESTOR_ASSIGN_OR_RETURN(const bool mean, pooling.BoolOr("pooling_mode_mean_tokens", false));
    NESTOR_ASSIGN_OR_RETURN(const bool cls, pooling.BoolOr("pooling_mode_cls_token", false));
    if (mean == cls) {
      return absl::UnimplementedError(absl::StrCat(
          pooling_path,
          ": expected exactly one of pooling_mode_mean_tokens and pooling_mode_cls_token"));
    }
    spec->pooling = mean ? PoolingKind::kMean : PoolingKind::kCls;
  }
  const std::string sentence_path = directory + "/sentence_bert_config.json";
  if (std::filesystem::exists(sentence_path)) {
    NESTOR_ASSIGN_OR_RETURN(const ConfigFile sentence, ConfigFile::Open(sentence_path));
    NESTOR_ASSIGN_OR_RETURN(const int64_t length,
                            sentence.CountOr("max_seq_length", spec->context_length));
    spec->context_length = std::min(spec->context_length, length);
  }
  return absl::OkStatus();
}

absl::Status AddEndTokens(const ConfigFile& config, ModelSpec* spec) {
  if (!config.Has("eos_token_id")) return absl::OkStatus();
  const Json& ids = config.json()["eos_token_id"];
  for (const Json& id : ids.is_array() ? ids : Json::array({ids})) {
    if (!id.is_number_unsigned() || id.get<int64_t>() >= spec->vocabulary) {
      return config.Error("eos_token_id", "expected token ids of the vocabulary");
    }
    spec->end_tokens.push_back(id.get<int32_t>());
  }
  return absl::OkStatus();
}

// generation_config.json goes before config.json, as in transformers.
absl::Status ReadEndTokens(const std::string& directory, const ConfigFile& config,
                           ModelSpec* spec) {
  const std::string path = directory + "/generation_config.json";
  if (std::filesystem::exists(path)) {
    NESTOR_ASSIGN_OR_RETURN(const ConfigFile generation, ConfigFile::Open(path));
    NESTOR_RETURN_IF_ERROR(AddEndTokens(generation, spec));
    if (!spec->end_tokens.empty()) return absl::OkStatus();
  }
  return AddEndTokens(config, spec);
}

struct Architecture {
  const char* name;
  absl::StatusOr<ModelSpec> (*read)(const ConfigFile& config);
};

constexpr Architecture kArchitectures[] = {
    {"LlamaForCausalLM", ReadLlama}, {"Qwen2ForCausalLM", ReadQwen2},
    {"Qwen3ForCausalLM", ReadQwen3}, {"GPT2LMHeadModel", ReadGpt2},
    {"BertModel", ReadBert},         {"BertForSequenceClassification", ReadBertClassifier}};

std::string NamesOfArchitectures() {
  return absl::StrJoin(
      kArchitectures, ", ",
      [](std::string* out, const Architecture& architecture) { out->append(architecture.name); });
}

// The outputs of `layers` stand in one source tensor, in this order.
void ShareTensor(const std::string& name, std::span<LinearSpec> layers) {
  int64_t num_outputs = 0;
  for (LinearSpec& layer : layers) {
    layer.source.name = name;
    layer.source.first_output = num_outputs;
    num_outputs += layer.out;
  }
  for (LinearSpec& layer : layers) layer.source.num_outputs = num_outputs;
}

}  // namespace

absl::StatusOr<ModelSpec> ReadModelSpec(const std::string& directory) {
  NESTOR_ASSIGN_OR_RETURN(const ConfigFile config, ConfigFile::Open(directory + "/config.json"));
  if (!config.Has("architectures") || !config.json()["architectures"].is_array() ||
      config.json()["architectures"].size() != 1 ||
      !config.json()["architectures"][0].is_string()) {
    return config.Error("architectures", "expected a list of one name");
  }
  const std::string name = config.json()["architectures"][0];
  const auto architecture =
      std::find_if(std::begin(kArchitectures), std::end(kArchitectures),
                   [&](const Architecture& known) { return known.name == name; });
  if (architecture == std::end(kArchitectures)) {
    return config.NotSupported("architectures", NamesOfArchitectures());
  }
  NESTOR_ASSIGN_OR_RETURN(ModelSpec spec, architecture->read(config));
  spec.architecture = name;
  if (!spec.is_encoder()) {
    NESTOR_RETURN_IF_ERROR(ReadEndTokens(directory, config, &spec));
  } else if (!spec.is_classifier()) {
    NESTOR_RETURN_IF_ERROR(ReadPooling(directory, &spec));
  }
  return spec;
}

std::string NameInBlock(const std::string& pattern, int64_t block) {
  return absl::StrReplaceAll(pattern, {{"{}", absl::StrCat(block)}});
}

std::vector<LinearSpec> LayersOf(const ModelSpec& spec) {
  std::vector<LinearSpec> layers;
  const int64_t query_size = spec.num_heads * spec.head_dim;
  const int64_t key_size = spec.num_kv_heads * spec.head_dim;
  for (int32_t block = 0; block < spec.num_blocks; ++block) {
    const auto add = [&](const std::string& pattern, LinearRole role, int64_t out, int64_t in,
                         bool has_bias) {
      const std::string name = NameInBlock(pattern, block);
      const SourceTensor source = {name, out, 0, spec.stores_transposed};
      layers.push_back({name, role, block, out, in, has_bias, source});
    };
    const BlockNames& names = spec.names;
    add(names.query, LinearRole::kQuery, query_size, spec.hidden, spec.has_qkv_bias);
    add(names.key, LinearRole::kKey, key_size, spec.hidden, spec.has_qkv_bias);
    add(names.value, LinearRole::kValue, key_size, spec.hidden, spec.has_qkv_bias);
    if (!spec.fused_qkv.empty()) {
      ShareTensor(NameInBlock(spec.fused_qkv, block), std::span(layers).last(3));
    }
    add(names.attention_out, LinearRole::kAttentionOut, spec.hidden, query_size,
        spec.has_attention_out_bias);
    if (!names.gate.empty()) {
      add(names.gate, LinearRole::kGate, spec.mlp_size, spec.hidden, spec.has_mlp_bias);
    }
    add(names.up, LinearRole::kUp, spec.mlp_size, spec.hidden, spec.has_mlp_bias);
    add(names.down, LinearRole::kDown, spec.hidden, spec.mlp_size, spec.has_mlp_bias);
  }
  if (!spec.is_encoder()) {
    const SourceTensor source = {spec.head, spec.vocabulary, 0, false};
    layers.push_back(
        {spec.head, LinearRole::kHead, -1, spec.vocabulary, spec.hidden, false, source});
  }
  return layers;
}

int64_t AttentionFlops(const ModelSpec& spec, int64_t context) {
  return spec.num_blocks * 2 * 2 * context * spec.num_heads * spec.head_dim;
}

}  // namespace nestor
