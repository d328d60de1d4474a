#include "tests/testing/llama2c_import.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <span>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "base/file.h"
#include "base/status_macros.h"
#include "engine/tensor_file.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using Json = nlohmann::json;

constexpr int kBeginToken = 1;

class Reader {
 public:
  explicit Reader(std::span<const std::byte> bytes) : bytes_(bytes) {}
  template <typename Value>
  Value Read() {
    Value value{};
    if (bytes_.size() >= sizeof(value)) std::memcpy(&value, bytes_.data(), sizeof(value));
    bytes_ = bytes_.subspan(std::min(bytes_.size(), sizeof(value)));
    return value;
  }
  std::string ReadString(size_t size) {
    size = std::min(size, bytes_.size());
    std::string text(reinterpret_cast<const char*>(bytes_.data()), size);
    bytes_ = bytes_.subspan(size);
    return text;
  }
  std::vector<float> ReadFloats(int64_t count) {
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = Read<float>();
    return values;
  }

 private:
  std::span<const std::byte> bytes_;
};

struct Shape {
  int32_t hidden, mlp, blocks, heads, kv_heads, vocabulary, context;
};

// llama2.c rotates neighbours (2i, 2i + 1); the engine rotates halves (i, i + head_dim / 2).
std::vector<float> HalvesFromNeighbours(const std::vector<float>& weight, int64_t heads,
                                        int64_t head_dim, int64_t in) {
  std::vector<float> result(weight.size());
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t i = 0; i < head_dim; ++i) {
      const int64_t to = i % 2 * (head_dim / 2) + i / 2;
      std::copy_n(weight.begin() + (head * head_dim + i) * in, in,
                  result.begin() + (head * head_dim + to) * in);
    }
  }
  return result;
}

absl::Status WriteTokenizer(const std::string& path, int32_t vocabulary,
                            const std::string& output) {
  NESTOR_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  Reader reader(file.bytes());
  reader.Read<int32_t>();  // the longest piece
  std::vector<std::string> pieces;
  std::vector<float> scores;
  Json vocabulary_json = Json::object();
  for (int32_t i = 0; i < vocabulary; ++i) {
    scores.push_back(reader.Read<float>());
    const int32_t size = reader.Read<int32_t>();
    pieces.push_back(
        absl::StrReplaceAll(reader.ReadString(static_cast<size_t>(size)), {{" ", "▁"}}));
    if (i == 1) pieces.back() = "<s>";
    if (i == 2) pieces.back() = "</s>";
    vocabulary_json[pieces.back()] = i;
  }
  // sentencepiece joins the pair whose piece has the best score: merges in that order.
  std::vector<std::tuple<float, int32_t, size_t>> merges;
  for (int32_t i = 3; i < vocabulary; ++i) {
    const std::string& piece = pieces[static_cast<size_t>(i)];
    for (size_t cut = 1; cut < piece.size(); ++cut) {
      if (vocabulary_json.contains(piece.substr(0, cut)) &&
          vocabulary_json.contains(piece.substr(cut))) {
        merges.emplace_back(-scores[static_cast<size_t>(i)], i, cut);
      }
    }
  }
  std::sort(merges.begin(), merges.end());
  Json merges_json = Json::array();
  for (const auto& [score, id, cut] : merges) {
    const std::string& piece = pieces[static_cast<size_t>(id)];
    merges_json.push_back({piece.substr(0, cut), piece.substr(cut)});
  }
  const auto replace = [](const char* from, const char* to) {
    return Json({{"type", "Replace"}, {"pattern", {{"String", from}}}, {"content", to}});
  };
  Json added = Json::array();
  for (int id = 0; id < 3; ++id) {
    added.push_back({{"id", id},
                     {"content", pieces[static_cast<size_t>(id)]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const Json tokenizer = {
      {"added_tokens", added},
      {"normalizer",
       {{"type", "Sequence"},
        {"normalizers", {Json({{"type", "Prepend"}, {"prepend", "▁"}}), replace(" ", "▁")}}}},
      {"pre_tokenizer", nullptr},
      {"post_processor", nullptr},
      {"decoder",
       {{"type", "Sequence"},
        {"decoders",
         {replace("▁", " "), Json({{"type", "ByteFallback"}}), Json({{"type", "Fuse"}}),
          Json({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}})}}}},
      {"model",
       {{"type", "BPE"},
        {"unk_token", pieces[0]},
        {"byte_fallback", true},
        {"fuse_unk", true},
        {"vocab", vocabulary_json},
        {"merges", merges_json}}}};
  return WriteFileAtomically(output + "/tokenizer.json", tokenizer.dump());
}

}  // namespace

absl::Status ImportLlama2c(const std::string& model_path, const std::string& tokenizer_path,
                           const std::string& output) {
  std::error_code error;
  std::filesystem::create_directories(output, error);
  if (error) return FileError(output, error.value());
  NESTOR_ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(model_path));
  Reader reader(file.bytes());
  const Shape shape = reader.Read<Shape>();
  const int64_t head_dim = shape.hidden / shape.heads;
  const int64_t key_size = head_dim * shape.kv_heads;

  std::vector<TensorFileWriter::Entry> entries;
  std::map<std::string, std::vector<float>> values;
  const auto add = [&](const std::string& name, std::vector<int64_t> tensor_shape,
                       std::vector<float> tensor) {
    entries.push_back({name, DType::kF32, std::move(tensor_shape)});
    values[name] = std::move(tensor);
  };
  const auto add_blocks = [&](const std::string& name, std::vector<int64_t> tensor_shape,
                              int64_t rotated_heads = 0) {
    int64_t size = 1;
    for (const int64_t dimension : tensor_shape) size *= dimension;
    for (int32_t block = 0; block < shape.blocks; ++block) {
      std::vector<float> tensor = reader.ReadFloats(size);
      if (rotated_heads > 0) {
        tensor = HalvesFromNeighbours(tensor, rotated_heads, head_dim, shape.hidden);
      }
      add(absl::StrCat("model.layers.", block, ".", name, ".weight"), tensor_shape,
          std::move(tensor));
    }
  };
  add("model.embed_tokens.weight", {shape.vocabulary, shape.hidden},
      reader.ReadFloats(int64_t{shape.vocabulary} * shape.hidden));
  add_blocks("input_layernorm", {shape.hidden});
  add_blocks("self_attn.q_proj", {shape.hidden, shape.hidden}, shape.heads);
  add_blocks("self_attn.k_proj", {key_size, shape.hidden}, shape.kv_heads);
  add_blocks("self_attn.v_proj", {key_size, shape.hidden});
  add_blocks("self_attn.o_proj", {shape.hidden, shape.hidden});
  add_blocks("post_attention_layernorm", {shape.hidden});
  add_blocks("mlp.gate_proj", {shape.mlp, shape.hidden});
  add_blocks("mlp.down_proj", {shape.hidden, shape.mlp});
  add_blocks("mlp.up_proj", {shape.mlp, shape.hidden});
  add("model.norm.weight", {shape.hidden}, reader.ReadFloats(shape.hidden));

  NESTOR_ASSIGN_OR_RETURN(const std::unique_ptr<TensorFileWriter> writer,
                          TensorFileWriter::Create(output + "/model.safetensors", entries));
  for (const auto& [name, tensor] : values) {
    NESTOR_RETURN_IF_ERROR(writer->Write(name, std::as_bytes(std::span<const float>(tensor))));
  }
  NESTOR_RETURN_IF_ERROR(writer->Finish());
  const Json config = {{"architectures", {"LlamaForCausalLM"}},
                       {"num_hidden_layers", shape.blocks},
                       {"hidden_size", shape.hidden},
                       {"num_attention_heads", shape.heads},
                       {"num_key_value_heads", shape.kv_heads},
                       {"intermediate_size", shape.mlp},
                       {"vocab_size", shape.vocabulary},
                       {"max_position_embeddings", shape.context},
                       {"rms_norm_eps", 1e-5},
                       {"rope_theta", 10000.0},
                       {"hidden_act", "silu"},
                       {"eos_token_id", kBeginToken},
                       {"tie_word_embeddings", true}};
  NESTOR_RETURN_IF_ERROR(WriteFileAtomically(output + "/config.json", config.dump(2)));
  return WriteTokenizer(tokenizer_path, shape.vocabulary, output);
}

}  // namespace nestor
