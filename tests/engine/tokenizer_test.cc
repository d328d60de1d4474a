#include "engine/tokenizer.h"

#include <unistd.h>

#include <filesystem>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class TokenizerTest : public testing::Test {
 protected:
  void SetUp() override {
    path_ = absl::StrCat(testing::TempDir(), "/tokenizer_test_", getpid(), ".json");
    // Byte-level BPE over "a", "b", "ab", "Ġ" and the two bytes of "é".
    spec_ = nlohmann::json::parse(R"({
      "added_tokens": [
        {"id": 6, "content": "<eos>", "special": true, "normalized": false},
        {"id": 9, "content": "<tag>", "special": false, "normalized": false}],
      "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
      "decoder": {"type": "ByteLevel"},
      "model": {"type": "BPE", "merges": ["a b"],
                "vocab": {"a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ã": 4, "©": 5}}})");
  }
  void TearDown() override { std::filesystem::remove(path_); }

  absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& content) {
    EXPECT_TRUE(WriteFileAtomically(path_, content).ok());
    return Tokenizer::Load(path_);
  }
  std::unique_ptr<Tokenizer> LoadSpec() {
    auto tokenizer = Load(spec_.dump());
    EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
    return *std::move(tokenizer);
  }
  // The message with which spec_ is refused; it names the file.
  std::string ErrorOfSpec() {
    const auto tokenizer = Load(spec_.dump());
    EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument);
    const std::string message(tokenizer.status().message());
    EXPECT_THAT(message, HasSubstr(path_));
    return message;
  }

  std::string path_;
  nlohmann::json spec_;
};

TEST_F(TokenizerTest, MissingFileIsNotFound) {
  const auto tokenizer = Tokenizer::Load(path_);
  EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr(path_));
}

TEST_F(TokenizerTest, BrokenFilesAreRefused) {
  for (const std::string content : {"", "{", "[]", "{}", "5", "\xff\xfe", R"({"model": []})"}) {
    const auto tokenizer = Load(content);
    EXPECT_EQ(tokenizer.status().code(), absl::StatusCode::kInvalidArgument) << content;
    EXPECT_THAT(std::string(tokenizer.status().message()), HasSubstr(path_)) << content;
  }
}

TEST_F(TokenizerTest, UnsupportedTypesAreNamedWithTheirField) {
  struct Case {
    const char* field;
    const char* value;
    const char* message;
  };
  const Case cases[] = {
      {"/model/type", R"("Unigram")", R"(model.type: model "Unigram")"},
      {"/model/dropout", "0.1", "model.dropout: "},
      {"/normalizer", R"({"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Nmt"}]})",
       R"(normalizer.normalizers[1].type: normalizer "Nmt")"},
      {"/pre_tokenizer/type", R"("UnicodeScripts")", R"(pre_tokenizer.type: pre-tokenizer "Unic)"},
      {"/pre_tokenizer", R"({"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Odd"})",
       R"(pre_tokenizer.behavior: "Odd")"},
      {"/pre_tokenizer", R"({"type": "Split", "pattern": {"Regex": "(a"}, "behavior": "Removed"})",
       "pre_tokenizer.pattern.Regex: "},
      {"/pre_tokenizer",
       R"({"type": "Split", "pattern": {"Regex": "[a&&b]"}, "behavior": "Removed"})",
       "an intersection of classes"},
      {"/post_processor", R"({"type": "Other"})", R"(post_processor.type: post-processor "Other")"},
      {"/decoder/type", R"("CTC")", R"(decoder.type: decoder "CTC")"},
  };
  const nlohmann::json intact = spec_;
  for (const Case& test : cases) {
    spec_ = intact;
    spec_[nlohmann::json::json_pointer(test.field)] = nlohmann::json::parse(test.value);
    EXPECT_THAT(ErrorOfSpec(), HasSubstr(test.message));
  }
}

TEST_F(TokenizerTest, InconsistentModelsAreRefused) {
  struct Case {
    const char* field;
    const char* value;
    const char* message;
  };
  const Case cases[] = {
      {"/model/vocab/b", "0", "model.vocab.b: id 0 is also that of \"a\""},
      {"/model/vocab/b", "-1", "model.vocab.b: id out of range; was -1"},
      {"/model/vocab/b", "99999999999", "model.vocab.b: id out of range"},
      {"/model/vocab/b", "\"1\"", "model.vocab.b: must be an integer; was string"},
      {"/model/merges", R"(["a c"])", "model.merges[0]: \"c\" is not in model.vocab"},
      {"/model/merges", R"(["ab"])", "model.merges[0]: must be two tokens"},
      {"/model/merges", R"([["a", "b", "a"]])", "model.merges[0]: must be a pair; had 3"},
      {"/model/merges", "null", "model.merges: must be a list; was null"},
      {"/model/unk_token", R"("<unk>")", "model.unk_token: \"<unk>\" is not in model.vocab"},
      {"/model/fuse_unk", "1", "model.fuse_unk: must be true or false; was number"},
      {"/added_tokens/0/id", "-5", "added_tokens[0].id: out of range; was -5"},
      {"/added_tokens/0/content", "null", "added_tokens[0].content: must be a string"},
  };
  const nlohmann::json intact = spec_;
  for (const Case& test : cases) {
    spec_ = intact;
    spec_[nlohmann::json::json_pointer(test.field)] = nlohmann::json::parse(test.value);
    EXPECT_THAT(ErrorOfSpec(), HasSubstr(test.message));
  }
}

TEST_F(TokenizerTest, TruncationAndPaddingOfTheFileAreIgnored) {
  spec_["truncation"] = {{"max_length", 1}, {"strategy", "LongestFirst"}, {"stride", 0}};
  spec_["padding"] = {{"strategy", {{"Fixed", 7}}}, {"pad_id", 0}};
  EXPECT_THAT(*LoadSpec()->Encode("ab a", true), ElementsAre(2, 3, 0));
}

TEST_F(TokenizerTest, TextThatIsNotUtf8IsRefused) {
  const auto tokenizer = LoadSpec();
  // A lone byte, an overlong form, a surrogate, beyond U+10FFFF, a cut character.
  for (const std::string text :
       {"a\xff", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "a\xc3"}) {
    EXPECT_EQ(tokenizer->Encode(text, false).status().code(), absl::StatusCode::kInvalidArgument);
  }
}

TEST_F(TokenizerTest, IdsOutOfRangeDecodeToReplacementCharacters) {
  const auto tokenizer = LoadSpec();
  // 7 and 8 lie between the added tokens and stand for nothing.
  const std::vector<int32_t> ids = {0, -1, 10, INT32_MAX, 7, 1};
  EXPECT_EQ(tokenizer->Decode(ids, true), "a\uFFFD\uFFFD\uFFFD\uFFFDb");
  StreamingDecoder decoder(tokenizer.get());
  std::string streamed;
  for (const int32_t id : ids) streamed += decoder.Push(id);
  EXPECT_EQ(streamed + decoder.Flush(), "a\uFFFD\uFFFD\uFFFD\uFFFDb");
}

TEST_F(TokenizerTest, KnowsItsTokens) {
  const auto tokenizer = LoadSpec();
  EXPECT_EQ(tokenizer->size(), 10);
  EXPECT_EQ(tokenizer->IdOf("ab"), 2);
  EXPECT_EQ(tokenizer->IdOf("<eos>"), 6);
  EXPECT_EQ(tokenizer->IdOf("<tag>"), 9);
  EXPECT_EQ(tokenizer->IdOf("c"), std::nullopt);
  EXPECT_TRUE(tokenizer->IsSpecial(6));
  EXPECT_FALSE(tokenizer->IsSpecial(9));
  EXPECT_FALSE(tokenizer->IsSpecial(0));
  EXPECT_FALSE(tokenizer->IsSpecial(-1));
  EXPECT_FALSE(tokenizer->IsSpecial(10));
}

TEST_F(TokenizerTest, OnlySpecialTokensAreLeftOut) {
  const auto tokenizer = LoadSpec();
  const std::vector<int32_t> ids = *tokenizer->Encode("a<eos><tag>b", false);
  EXPECT_THAT(ids, ElementsAre(0, 6, 9, 1));
  EXPECT_EQ(tokenizer->Decode(ids, true), "a<tag>b");
  EXPECT_EQ(tokenizer->Decode(ids, false), "a<eos><tag>b");
}

TEST_F(TokenizerTest, StreamHoldsACharacterUntilItIsWhole) {
  const auto tokenizer = LoadSpec();
  StreamingDecoder decoder(tokenizer.get());
  EXPECT_EQ(decoder.Push(4), "");
  EXPECT_EQ(decoder.Push(5), "é");
  EXPECT_EQ(decoder.Push(4), "");
  EXPECT_EQ(decoder.Push(0), "\uFFFDa");
  EXPECT_EQ(decoder.Push(4), "");
  EXPECT_EQ(decoder.Flush(), "\uFFFD");
  EXPECT_EQ(decoder.Flush(), "");
  EXPECT_EQ(decoder.Push(1), "b");
}

// A quadratic merge would run into the test's time limit.
TEST_F(TokenizerTest, LongWordsAreMergedInLittleTime) {
  const auto tokenizer = LoadSpec();
  const std::string word(1 << 20, 'a');
  const auto ids = tokenizer->Encode(word + "b", false);
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_EQ(ids->size(), word.size());
  EXPECT_EQ(ids->back(), 2);
}

}  // namespace
}  // namespace nestor
