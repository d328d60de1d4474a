// Against llama.cpp's tokenizer vectors, where ../shared/data/tokenizers is present.

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/file.h"
#include "engine/tokenizer.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

const std::string kVectors = NESTOR_SOURCE_DIR "/../shared/data/tokenizers/";

// The arrays of a GGUF file's metadata that describe a vocabulary (GGUF version 3, little endian).
class GgufVocabulary {
 public:
  explicit GgufVocabulary(std::string content) : content_(std::move(content)) {
    position_ = 16;  // magic, version, number of tensors
    const uint64_t num_entries = Take<uint64_t>();
    for (uint64_t i = 0; i < num_entries; ++i) {
      const std::string key = TakeString();
      TakeValue(key, Take<uint32_t>());
    }
  }

  std::map<std::string, std::vector<std::string>> strings;
  std::map<std::string, std::vector<float>> floats;

 private:
  static constexpr uint32_t kFloat32 = 6;
  static constexpr uint32_t kString = 8;
  static constexpr uint32_t kArray = 9;

  template <typename T>
  T Take() {
    T value;
    std::memcpy(&value, content_.data() + position_, sizeof(value));
    position_ += sizeof(value);
    return value;
  }
  std::string TakeString() {
    const uint64_t size = Take<uint64_t>();
    position_ += size;
    return content_.substr(position_ - size, size);
  }
  void TakeValue(const std::string& key, uint32_t type) {
    constexpr size_t kSizes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    if (type == kString) {
      strings[key].push_back(TakeString());
    } else if (type == kFloat32) {
      floats[key].push_back(Take<float>());
    } else if (type == kArray) {
      const uint32_t element_type = Take<uint32_t>();
      const uint64_t size = Take<uint64_t>();
      for (uint64_t i = 0; i < size; ++i) TakeValue(key, element_type);
    } else {
      position_ += kSizes[type];
    }
  }

  const std::string content_;
  size_t position_;
};

nlohmann::json VocabularyOf(const std::vector<std::string>& tokens) {
  nlohmann::json vocabulary;
  for (size_t id = 0; id < tokens.size(); ++id) vocabulary[tokens[id]] = id;
  return vocabulary;
}

nlohmann::json ByteLevelSpec(const GgufVocabulary& gguf) {
  return {{"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}}},
          {"decoder", {{"type", "ByteLevel"}}},
          {"model",
           {{"type", "BPE"},
            {"vocab", VocabularyOf(gguf.strings.at("tokenizer.ggml.tokens"))},
            {"merges", gguf.strings.at("tokenizer.ggml.merges")}}}};
}

// Sentencepiece has scores in place of merges: every way to make a token of two others, the best
// score first.
nlohmann::json SentencepieceSpec(const GgufVocabulary& gguf) {
  const std::vector<std::string>& tokens = gguf.strings.at("tokenizer.ggml.tokens");
  const std::vector<float>& scores = gguf.floats.at("tokenizer.ggml.scores");
  std::map<std::string, size_t> ids;
  for (size_t id = 0; id < tokens.size(); ++id) ids[tokens[id]] = id;
  std::vector<std::pair<float, nlohmann::json>> merges;
  for (size_t id = 0; id < tokens.size(); ++id) {
    for (size_t cut = 1; cut < tokens[id].size(); ++cut) {
      const std::string left = tokens[id].substr(0, cut);
      const std::string right = tokens[id].substr(cut);
      if (ids.count(left) == 0 || ids.count(right) == 0) continue;
      merges.emplace_back(scores[id], nlohmann::json::array({left, right}));
    }
  }
  std::stable_sort(merges.begin(), merges.end(),
                   [](const auto& a, const auto& b) { return a.first > b.first; });
  nlohmann::json pairs = nlohmann::json::array();
  for (const auto& [score, pair] : merges) pairs.push_back(pair);
  return {{"normalizer",
           {{"type", "Sequence"},
            {"normalizers",
             {{{"type", "Prepend"}, {"prepend", "▁"}},
              {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "▁"}}}}}},
          {"model",
           {{"type", "BPE"},
            {"vocab", VocabularyOf(tokens)},
            {"merges", pairs},
            {"unk_token", "<unk>"},
            {"fuse_unk", true},
            {"byte_fallback", true}}}};
}

void CheckVectors(const std::string& name, nlohmann::json (*make_spec)(const GgufVocabulary&)) {
  if (!std::filesystem::exists(kVectors)) GTEST_SKIP() << "no " << kVectors;
  const auto gguf = ReadFile(absl::StrCat(kVectors, name, ".gguf"));
  const auto inputs = ReadFile(absl::StrCat(kVectors, name, ".gguf.inp"));
  const auto outputs = ReadFile(absl::StrCat(kVectors, name, ".gguf.out"));
  ASSERT_TRUE(gguf.ok() && inputs.ok() && outputs.ok());
  const std::string path = absl::StrCat(testing::TempDir(), "/", name, "_", getpid(), ".json");
  ASSERT_TRUE(WriteFileAtomically(path, make_spec(GgufVocabulary(*gguf)).dump()).ok());
  const auto tokenizer = Tokenizer::Load(path);
  std::filesystem::remove(path);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();

  const std::vector<std::string> texts = absl::StrSplit(*inputs, "\n__ggml_vocab_test__\n");
  const std::vector<std::string> lines = absl::StrSplit(*outputs, '\n');
  ASSERT_EQ(texts.size(), lines.size());
  // The last of both is what follows the last separator.
  for (size_t i = 0; i + 1 < texts.size(); ++i) {
    std::vector<int32_t> expected;
    for (const auto& number : absl::StrSplit(lines[i], ' ', absl::SkipEmpty())) {
      ASSERT_TRUE(absl::SimpleAtoi(number, &expected.emplace_back()));
    }
    const auto ids = (*tokenizer)->Encode(texts[i], /*adds_special_tokens=*/false);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, expected) << texts[i];
  }
}

TEST(TokenizerGgufTest, Gpt2VectorsGiveTheSameIds) {
  CheckVectors("ggml-vocab-gpt-2", ByteLevelSpec);
}

TEST(TokenizerGgufTest, LlamaVectorsGiveTheSameIds) {
  CheckVectors("ggml-vocab-llama-spm", SentencepieceSpec);
}

}  // namespace
}  // namespace nestor
