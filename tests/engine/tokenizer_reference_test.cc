// Against PyPI's tokenizers: see scripts/make_tokenizer_fixtures.py.

#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/file.h"
#include "engine/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

constexpr size_t kHashDigits = 6;
const std::string kFixtures = NESTOR_SOURCE_DIR "/tests/data/tokenizers/";

nlohmann::json ReadFixture(const std::string& name) {
  const absl::StatusOr<std::string> content = ReadFile(kFixtures + name);
  return content.ok() ? nlohmann::json::parse(*content) : nlohmann::json();
}

const nlohmann::json& Variants() {
  static const nlohmann::json variants = ReadFixture("variants.json");
  return variants;
}

// One tokenizer of variants.json, written out as a file.
class TokenizerReferenceTest : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    variant_ = Variants().at(static_cast<size_t>(GetParam()));
    lines_ = ReadFixture("corpus.json").get<std::vector<std::string>>();
    nlohmann::json spec = ReadFixture(absl::StrCat(variant_["base"].get<std::string>(), ".json"));
    for (const auto& [key, value] : variant_["changes"].items()) {
      if (key == "model") {
        spec["model"].update(value);
      } else {
        spec[key] = value;
      }
    }
    path_ = absl::StrCat(testing::TempDir(), "/tokenizer_", getpid(), "_", GetParam(), ".json");
    ASSERT_TRUE(WriteFileAtomically(path_, spec.dump()).ok());
    auto tokenizer = Tokenizer::Load(path_);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
  }
  void TearDown() override { std::filesystem::remove(path_); }

  std::vector<int32_t> Encode(const std::string& text, bool adds_special_tokens) const {
    const auto ids = tokenizer_->Encode(text, adds_special_tokens);
    EXPECT_TRUE(ids.ok()) << ids.status();
    return ids.ok() ? *ids : std::vector<int32_t>();
  }

  // The hash at `index` of a string of them.
  std::string ExpectedHash(const char* field, size_t index) const {
    return variant_[field].get<std::string>().substr(kHashDigits * index, kHashDigits);
  }
  size_t NumHashes(const char* field) const {
    return variant_[field].get<std::string>().size() / kHashDigits;
  }

  nlohmann::json variant_;
  std::vector<std::string> lines_;
  std::unique_ptr<Tokenizer> tokenizer_;

 private:
  std::string path_;
};

// 64-bit FNV-1a of the parts with 0xff between, its upper 24 bits.
std::string Hash(const std::vector<std::string>& parts) {
  uint64_t value = 0xcbf29ce484222325;
  const auto add = [&value](uint8_t byte) { value = (value ^ byte) * 0x100000001b3; };
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) add(0xff);
    for (const char byte : parts[i]) add(static_cast<uint8_t>(byte));
  }
  return absl::StrFormat("%06x", value >> 40);
}

std::string LittleEndianBytes(const std::vector<int32_t>& ids) {
  std::string bytes;
  for (const int32_t id : ids) {
    for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>(id >> shift & 0xff);
  }
  return bytes;
}

// The same linear congruence as the fixtures' generator has.
std::vector<int32_t> RandomIds(uint32_t seed, int32_t size) {
  std::vector<int32_t> ids;
  for (int i = 0; i < 24; ++i) {
    seed = (seed * 1103515245u + 12345u) % (1u << 31);
    ids.push_back(static_cast<int32_t>(seed >> 8) % size);
  }
  return ids;
}

bool EndsInsideCharacter(const std::string& text) {
  size_t num_trailing = 0;
  while (num_trailing < text.size() && (text[text.size() - 1 - num_trailing] & 0xc0) == 0x80) {
    ++num_trailing;
  }
  if (num_trailing == text.size()) return num_trailing > 0;
  const auto lead = static_cast<uint8_t>(text[text.size() - 1 - num_trailing]);
  const size_t expected = lead < 0xc0 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
  return num_trailing != expected;
}

TEST_P(TokenizerReferenceTest, SizeIsThatOfTheVocabularyWithAddedTokens) {
  EXPECT_EQ(tokenizer_->size(), variant_["size"].get<int32_t>());
}

TEST_P(TokenizerReferenceTest, HandWrittenLinesGiveTheSameIdsAndText) {
  for (size_t i = 0; i < variant_["explicit"].size(); ++i) {
    const nlohmann::json& expected = variant_["explicit"][i];
    SCOPED_TRACE(absl::StrCat("line ", i, ": ", lines_[i]));
    const std::vector<int32_t> ids = Encode(lines_[i], /*adds_special_tokens=*/true);
    EXPECT_EQ(ids, expected["ids"].get<std::vector<int32_t>>());
    EXPECT_EQ(tokenizer_->Decode(ids, true), expected["text"].get<std::string>());
  }
}

TEST_P(TokenizerReferenceTest, EveryLineGivesTheSameIdsAndText) {
  ASSERT_GE(NumHashes("hashes"), 100u);
  for (size_t i = 0; i < NumHashes("hashes"); ++i) {
    const std::vector<int32_t> ids = Encode(lines_[i], /*adds_special_tokens=*/false);
    EXPECT_EQ(Hash({LittleEndianBytes(ids), tokenizer_->Decode(ids, true),
                    tokenizer_->Decode(ids, false)}),
              ExpectedHash("hashes", i))
        << variant_["name"] << " line " << i << ": " << lines_[i];
  }
}

TEST_P(TokenizerReferenceTest, RandomIdsGiveTheSameText) {
  for (size_t i = 0; i < NumHashes("random_hashes"); ++i) {
    const std::vector<int32_t> ids = RandomIds(static_cast<uint32_t>(i), tokenizer_->size());
    EXPECT_EQ(Hash({tokenizer_->Decode(ids, true)}), ExpectedHash("random_hashes", i))
        << variant_["name"] << ": " << testing::PrintToString(ids);
  }
}

TEST_P(TokenizerReferenceTest, StreamedTextIsTheWholeTextInWholeCharacters) {
  std::vector<std::vector<int32_t>> sequences;
  for (const std::string& line : lines_) sequences.push_back(Encode(line, true));
  for (uint32_t seed = 0; seed < 200; ++seed) {
    sequences.push_back(RandomIds(seed, tokenizer_->size()));
  }
  StreamingDecoder decoder(tokenizer_.get());
  for (const std::vector<int32_t>& ids : sequences) {
    std::string streamed;
    for (const int32_t id : ids) {
      streamed += decoder.Push(id);
      ASSERT_FALSE(EndsInsideCharacter(streamed)) << variant_["name"] << ": " << streamed;
    }
    streamed += decoder.Flush();
    ASSERT_EQ(streamed, tokenizer_->Decode(ids, true)) << variant_["name"];
  }
}

INSTANTIATE_TEST_SUITE_P(
    Variants, TokenizerReferenceTest, testing::Range(0, static_cast<int>(Variants().size())),
    [](const testing::TestParamInfo<int>& info) {
      return Variants()[static_cast<size_t>(info.param)]["name"].get<std::string>();
    });

}  // namespace
}  // namespace nestor
