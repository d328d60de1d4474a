#include "tests/testing/tiny_checkpoint.h"

#include <cmath>
#include <filesystem>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/bfloat16.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "engine/tensor_file.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using Json = nlohmann::json;

constexpr int kNumBytes = 256;
constexpr int kEndOfTurn = kNumBytes + 1;
constexpr int kLlamaVocabulary = kNumBytes + 2;

class RandomWeights {
 public:
  RandomWeights(uint64_t seed, bool stores_bf16) : random_(seed), stores_bf16_(stores_bf16) {}

  // Normal with standard deviation `deviation` around `mean`.
  void Add(const std::string& name, std::vector<int64_t> shape, double deviation, double mean = 0) {
    int64_t size = 1;
    for (const int64_t dimension : shape) size *= dimension;
    std::normal_distribution<double> normal(mean, deviation);
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values) value = static_cast<float>(normal(random_));
    entries_.push_back({name, stores_bf16_ ? DType::kBf16 : DType::kF32, std::move(shape)});
    values_.push_back(std::move(values));
  }
  void AddLinear(const std::string& name, int64_t out, int64_t in, bool has_bias) {
    Add(name + ".weight", {out, in}, 1.2 / std::sqrt(static_cast<double>(in)));
    if (has_bias) Add(name + ".bias", {out}, 0.1);
  }
  // Multiplies every 32nd row, or column, of the matrix that was added last.
  void ScaleRows(float factor) {
    ScaleWhere(factor, [](int64_t row, int64_t) { return row % 32 == 0; });
  }
  void ScaleColumns(float factor) {
    ScaleWhere(factor, [](int64_t, int64_t column) { return column % 32 == 0; });
  }
  void AddLayerNorm(const std::string& name, int64_t size) {
    Add(name + ".weight", {size}, 0.1, 1);
    Add(name + ".bias", {size}, 0.1);
  }

  absl::Status Write(const std::string& path) const {
    NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<TensorFileWriter> writer,
                            TensorFileWriter::Create(path, entries_));
    for (size_t i = 0; i < entries_.size(); ++i) {
      if (stores_bf16_) {
        std::vector<uint16_t> bits;
        for (const float value : values_[i]) bits.push_back(Bfloat16FromFloat(value));
        NESTOR_RETURN_IF_ERROR(
            writer->Write(entries_[i].name, std::as_bytes(std::span<const uint16_t>(bits))));
      } else {
        NESTOR_RETURN_IF_ERROR(
            writer->Write(entries_[i].name, std::as_bytes(std::span<const float>(values_[i]))));
      }
    }
    return writer->Finish();
  }

 private:
  template <typename Predicate>
  void ScaleWhere(float factor, Predicate is_scaled) {
    const int64_t columns = entries_.back().shape[1];
    for (int64_t i = 0; i < std::ssize(values_.back()); ++i) {
      if (is_scaled(i / columns, i % columns)) values_.back()[static_cast<size_t>(i)] *= factor;
    }
  }

  std::mt19937_64 random_;
  const bool stores_bf16_;
  std::vector<TensorFileWriter::Entry> entries_;
  std::vector<std::vector<float>> values_;
};

std::string Utf8(int code_point) {
  if (code_point < 0x80) return std::string(1, static_cast<char>(code_point));
  return {static_cast<char>(0xc0 | (code_point >> 6)), static_cast<char>(0x80 | (code_point & 63))};
}

// GPT-2's printable stand-in for every byte.
std::vector<std::string> ByteTokens() {
  std::vector<std::string> tokens;
  int next = 256;
  for (int byte = 0; byte < kNumBytes; ++byte) {
    const bool is_printable = (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) ||
                              (byte >= 0xae && byte <= 0xff);
    tokens.push_back(Utf8(is_printable ? byte : next++));
  }
  return tokens;
}

Json AddedToken(int id, const std::string& content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

absl::Status WriteJson(const std::string& path, const Json& json) {
  return WriteFileAtomically(path, json.dump(2));
}

absl::Status WriteByteLevelTokenizer(const std::string& directory) {
  Json vocabulary = Json::object();
  const std::vector<std::string> tokens = ByteTokens();
  for (int i = 0; i < kNumBytes; ++i) vocabulary[tokens[static_cast<size_t>(i)]] = i;
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  const Json tokenizer = {
      {"version", "1.0"},
      {"added_tokens",
       {AddedToken(kNumBytes, "<|im_start|>"), AddedToken(kEndOfTurn, "<|im_end|>")}},
      {"normalizer", nullptr},
      {"pre_tokenizer", byte_level},
      {"post_processor", nullptr},
      {"decoder", byte_level},
      {"model", {{"type", "BPE"}, {"vocab", vocabulary}, {"merges", Json::array()}}}};
  NESTOR_RETURN_IF_ERROR(WriteJson(directory + "/tokenizer.json", tokenizer));
  return WriteJson(
      directory + "/tokenizer_config.json",
      {{"eos_token", "<|im_end|>"},
       {"chat_template",
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt "
        "%}{{ '<|im_start|>assistant\n' }}{% endif %}"}});
}

absl::StatusOr<int64_t> WriteWordPieceTokenizer(const std::string& directory) {
  std::vector<std::string> tokens = {"[PAD]", "[UNK]", "[CLS]", "[SEP]"};
  for (char c = '!'; c <= '~'; ++c) {
    if (c >= 'A' && c <= 'Z') continue;
    tokens.push_back(std::string(1, c));
    tokens.push_back(absl::StrCat("##", std::string(1, c)));
  }
  Json vocabulary = Json::object();
  for (size_t i = 0; i < tokens.size(); ++i) vocabulary[tokens[i]] = i;
  Json added = Json::array();
  for (int i = 0; i < 4; ++i) added.push_back(AddedToken(i, tokens[static_cast<size_t>(i)]));
  const auto special = [](const char* id) {
    return Json({{"SpecialToken", {{"id", id}, {"type_id", 0}}}});
  };
  const Json tokenizer = {
      {"version", "1.0"},
      {"added_tokens", added},
      {"normalizer",
       {{"type", "BertNormalizer"},
        {"clean_text", true},
        {"handle_chinese_chars", true},
        {"strip_accents", nullptr},
        {"lowercase", true}}},
      {"pre_tokenizer", {{"type", "BertPreTokenizer"}}},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single",
         {special("[CLS]"), {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, special("[SEP]")}},
        {"pair", Json::array()},
        {"special_tokens",
         {{"[CLS]", {{"id", "[CLS]"}, {"ids", {2}}, {"tokens", {"[CLS]"}}}},
          {"[SEP]", {{"id", "[SEP]"}, {"ids", {3}}, {"tokens", {"[SEP]"}}}}}}}},
      {"decoder", {{"type", "WordPiece"}, {"prefix", "##"}, {"cleanup", true}}},
      {"model",
       {{"type", "WordPiece"},
        {"unk_token", "[UNK]"},
        {"continuing_subword_prefix", "##"},
        {"max_input_chars_per_word", 100},
        {"vocab", vocabulary}}}};
  NESTOR_RETURN_IF_ERROR(WriteJson(directory + "/tokenizer.json", tokenizer));
  return static_cast<int64_t>(tokens.size());
}

absl::Status MakeDirectory(const std::string& directory) {
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error) return FileError(directory, error.value());
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteTinyLlama(const std::string& directory, const TinyCheckpointOptions& options) {
  NESTOR_RETURN_IF_ERROR(MakeDirectory(directory));
  NESTOR_RETURN_IF_ERROR(WriteByteLevelTokenizer(directory));
  NESTOR_RETURN_IF_ERROR(
      WriteJson(directory + "/config.json", {{"architectures", {"LlamaForCausalLM"}},
                                             {"model_type", "llama"},
                                             {"num_hidden_layers", options.num_blocks},
                                             {"hidden_size", options.hidden},
                                             {"num_attention_heads", options.num_heads},
                                             {"num_key_value_heads", options.num_kv_heads},
                                             {"intermediate_size", options.mlp_size},
                                             {"vocab_size", kLlamaVocabulary},
                                             {"max_position_embeddings", options.context_length},
                                             {"rms_norm_eps", 1e-5},
                                             {"rope_theta", 10000.0},
                                             {"hidden_act", "silu"},
                                             {"eos_token_id", kEndOfTurn},
                                             {"tie_word_embeddings", options.tied_head}}));
  const int64_t head_dim = options.hidden / options.num_heads;
  const int64_t key_size = head_dim * options.num_kv_heads;
  RandomWeights weights(options.seed, options.stores_bf16);
  weights.Add("model.embed_tokens.weight", {kLlamaVocabulary, options.hidden}, 0.5);
  if (!options.tied_head) weights.AddLinear("lm_head", kLlamaVocabulary, options.hidden, false);
  for (int64_t i = 0; i < options.num_blocks; ++i) {
    const std::string block = absl::StrCat("model.layers.", i, ".");
    weights.AddLinear(block + "self_attn.q_proj", options.hidden, options.hidden, false);
    weights.AddLinear(block + "self_attn.k_proj", key_size, options.hidden, false);
    weights.AddLinear(block + "self_attn.v_proj", key_size, options.hidden, false);
    weights.AddLinear(block + "self_attn.o_proj", options.hidden, options.hidden, false);
    weights.AddLinear(block + "mlp.gate_proj", options.mlp_size, options.hidden, false);
    weights.AddLinear(block + "mlp.up_proj", options.mlp_size, options.hidden, false);
    weights.ScaleRows(options.outlier);
    weights.AddLinear(block + "mlp.down_proj", options.hidden, options.mlp_size, false);
    weights.ScaleColumns(1 / options.outlier);
    weights.Add(block + "input_layernorm.weight", {options.hidden}, 0.1, 1);
    weights.Add(block + "post_attention_layernorm.weight", {options.hidden}, 0.1, 1);
  }
  weights.Add("model.norm.weight", {options.hidden}, 0.1, 1);
  return weights.Write(directory + "/model.safetensors");
}

absl::Status WriteTinyBert(const std::string& directory, const TinyCheckpointOptions& options) {
  NESTOR_RETURN_IF_ERROR(MakeDirectory(directory + "/1_Pooling"));
  NESTOR_ASSIGN_OR_RETURN(const int64_t vocabulary, WriteWordPieceTokenizer(directory));
  NESTOR_RETURN_IF_ERROR(
      WriteJson(directory + "/config.json", {{"architectures", {"BertModel"}},
                                             {"model_type", "bert"},
                                             {"num_hidden_layers", options.num_blocks},
                                             {"hidden_size", options.hidden},
                                             {"num_attention_heads", options.num_heads},
                                             {"intermediate_size", options.mlp_size},
                                             {"vocab_size", vocabulary},
                                             {"type_vocab_size", 2},
                                             {"max_position_embeddings", options.context_length},
                                             {"layer_norm_eps", 1e-12},
                                             {"hidden_act", "gelu"}}));
  NESTOR_RETURN_IF_ERROR(
      WriteJson(directory + "/modules.json",
                Json::array({{{"idx", 0}, {"type", "sentence_transformers.models.Transformer"}},
                             {{"idx", 1}, {"type", "sentence_transformers.models.Pooling"}},
                             {{"idx", 2}, {"type", "sentence_transformers.models.Normalize"}}})));
  NESTOR_RETURN_IF_ERROR(
      WriteJson(directory + "/1_Pooling/config.json",
                {{"pooling_mode_mean_tokens", true}, {"pooling_mode_cls_token", false}}));
  RandomWeights weights(options.seed, options.stores_bf16);
  weights.Add("embeddings.word_embeddings.weight", {vocabulary, options.hidden}, 0.5);
  weights.Add("embeddings.position_embeddings.weight", {options.context_length, options.hidden},
              0.1);
  weights.Add("embeddings.token_type_embeddings.weight", {2, options.hidden}, 0.1);
  weights.AddLayerNorm("embeddings.LayerNorm", options.hidden);
  for (int64_t i = 0; i < options.num_blocks; ++i) {
    const std::string block = absl::StrCat("encoder.layer.", i, ".");
    for (const char* name : {"query", "key", "value"}) {
      weights.AddLinear(block + "attention.self." + name, options.hidden, options.hidden, true);
    }
    weights.AddLinear(block + "attention.output.dense", options.hidden, options.hidden, true);
    weights.AddLayerNorm(block + "attention.output.LayerNorm", options.hidden);
    weights.AddLinear(block + "intermediate.dense", options.mlp_size, options.hidden, true);
    weights.AddLinear(block + "output.dense", options.hidden, options.mlp_size, true);
    weights.AddLayerNorm(block + "output.LayerNorm", options.hidden);
  }
  return weights.Write(directory + "/model.safetensors");
}

}  // namespace nestor
