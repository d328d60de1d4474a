#include "compress/corpus.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/temporary_directory.h"
#include "tests/testing/tiny_checkpoint.h"

namespace nestor {
namespace {

using testing::HasSubstr;

std::string Lines(int begin, int end) {
  std::string text;
  for (int i = begin; i < end; ++i) absl::StrAppend(&text, "line number ", i, " of the text\n");
  return text;
}

class CorpusTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(WriteTinyLlama(directory_.path() + "/llama").ok());
    ASSERT_TRUE(WriteTinyBert(directory_.path() + "/bert").ok());
  }
  void Load(const std::string& name) {
    auto tokenizer = Tokenizer::Load(directory_.path() + "/" + name + "/tokenizer.json");
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
    const auto spec = ReadModelSpec(directory_.path() + "/" + name);
    ASSERT_TRUE(spec.ok()) << spec.status();
    spec_ = *spec;
  }
  std::string Write(const std::string& name, const std::string& text) {
    const std::string path = directory_.path() + "/" + name;
    EXPECT_TRUE(WriteFileAtomically(path, text).ok());
    return path;
  }
  TemporaryDirectory directory_;
  std::unique_ptr<Tokenizer> tokenizer_;
  ModelSpec spec_;
};

TEST_F(CorpusTest, WindowsFollowEachOtherWithoutOverlap) {
  Load("llama");
  const std::string text = Lines(0, 40);
  const auto windows = SequencesOf(text, *tokenizer_, spec_, 0);
  ASSERT_TRUE(windows.ok()) << windows.status();
  std::vector<int32_t> joined;
  for (size_t i = 0; i < windows->size(); ++i) {
    if (i + 1 < windows->size()) {
      EXPECT_EQ((*windows)[i].size(), 256u);  // the tiny model's whole context
    }
    joined.insert(joined.end(), (*windows)[i].begin(), (*windows)[i].end());
  }
  EXPECT_EQ(tokenizer_->Decode(joined, /*skips_special_tokens=*/false), text);
  const auto bounded = SequencesOf(text, *tokenizer_, spec_, 300);
  ASSERT_TRUE(bounded.ok());
  EXPECT_EQ(CountTokens(*bounded), 300);
  // A last window of one token has nothing to score.
  const auto odd = SequencesOf(text, *tokenizer_, spec_, 257);
  ASSERT_TRUE(odd.ok());
  EXPECT_EQ(CountTokens(*odd), 256);
}

TEST_F(CorpusTest, AnEncoderGetsLinesWithSpecialTokens) {
  Load("bert");
  const auto lines = SequencesOf("ab\n\n  \nc\n", *tokenizer_, spec_, 0);
  ASSERT_TRUE(lines.ok()) << lines.status();
  ASSERT_EQ(lines->size(), 2u);
  EXPECT_EQ((*lines)[0].size(), 4u);
  EXPECT_EQ((*lines)[0].front(), *tokenizer_->IdOf("[CLS]"));
  EXPECT_EQ((*lines)[1].back(), *tokenizer_->IdOf("[SEP]"));
}

TEST_F(CorpusTest, HeldOutTextDoesNotCalibrate) {
  Load("bert");
  CorpusOptions options;
  options.calibration_paths = {Write("a.txt", Lines(0, 500))};
  options.calibration_tokens = 1 << 20;
  options.evaluation_tokens = 1 << 20;
  const auto corpus = ReadCorpus(options, *tokenizer_, spec_);
  ASSERT_TRUE(corpus.ok()) << corpus.status();
  EXPECT_NEAR(static_cast<double>(corpus->evaluation.size()), 100, 5);
  EXPECT_EQ(corpus->calibration.size() + corpus->evaluation.size(), 500u);
  const std::set<std::vector<int32_t>> calibration(corpus->calibration.begin(),
                                                   corpus->calibration.end());
  for (const auto& line : corpus->evaluation) EXPECT_EQ(calibration.count(line), 0u);
  EXPECT_NE(corpus->calibration_sha256, corpus->evaluation_sha256);
}

TEST_F(CorpusTest, SeveralTextsGiveEqualSharesSpreadOverEach) {
  Load("bert");
  CorpusOptions options;
  options.calibration_paths = {Write("a.txt", Lines(1000, 1400)),
                               Write("b.txt", Lines(2000, 6000))};
  options.evaluation_path = Write("c.txt", Lines(7000, 7100));
  options.calibration_tokens = 8000;
  options.evaluation_tokens = 500;
  const auto corpus = ReadCorpus(options, *tokenizer_, spec_);
  ASSERT_TRUE(corpus.ok()) << corpus.status();
  EXPECT_NEAR(static_cast<double>(CountTokens(corpus->calibration)), 8000, 100);
  EXPECT_NEAR(static_cast<double>(CountTokens(corpus->evaluation)), 500, 50);
  int of_first = 0;
  bool has_late_line = false;
  for (const auto& line : corpus->calibration) {
    const std::string text = tokenizer_->Decode(line, /*skips_special_tokens=*/true);
    if (text.find("1") < text.find("2")) ++of_first;
    has_late_line = has_late_line || text.find("59") != std::string::npos;
  }
  EXPECT_NEAR(of_first, static_cast<int>(corpus->calibration.size()) / 2,
              static_cast<double>(corpus->calibration.size()) / 4);
  EXPECT_TRUE(has_late_line);
}

TEST(SpreadOverTest, TakesBeginningsFromAllOver) {
  TokenSequences sequences;
  for (int32_t i = 0; i < 8; ++i) sequences.push_back(std::vector<int32_t>(100, i));
  const TokenSequences taken = SpreadOver(sequences, 80, 20);
  ASSERT_EQ(taken.size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(taken[i], std::vector<int32_t>(20, static_cast<int32_t>(2 * i)));
  }
}

TEST(SpreadOverTest, TakesMoreOfEachWhereBeginningsAreTooFew) {
  const TokenSequences sequences = {std::vector<int32_t>(100, 1), std::vector<int32_t>(100, 2)};
  EXPECT_EQ(CountTokens(SpreadOver(sequences, 120, 20)), 120);
  EXPECT_EQ(SpreadOver(sequences, 1000, 20), sequences);
}

TEST(SpreadOverTest, TakesMoreOfLongOnesWhereOthersAreShort) {
  const TokenSequences sequences = {std::vector<int32_t>(100, 1), {2}};
  EXPECT_EQ(SpreadOver(sequences, 120, 20), sequences);
  EXPECT_EQ(CountTokens(SpreadOver(sequences, 51, 20)), 51);
}

TEST(SpreadOverTest, KeepsWhatIsShorter) {
  const TokenSequences sequences = {{1, 2, 3}, {4}, {5, 6}};
  EXPECT_EQ(SpreadOver(sequences, 6, 20), sequences);
  EXPECT_TRUE(SpreadOver({}, 6, 20).empty());
}

TEST_F(CorpusTest, ATextThatIsTooShortSaysHowShort) {
  Load("llama");
  CorpusOptions options;
  options.calibration_paths = {Write("short.txt", Lines(0, 20))};
  options.calibration_tokens = 16384;
  options.evaluation_tokens = 4096;
  const absl::Status status = ReadCorpus(options, *tokenizer_, spec_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("short.txt"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("at least 2048 are needed"));

  options.calibration_paths = {directory_.path() + "/absent.txt"};
  EXPECT_EQ(ReadCorpus(options, *tokenizer_, spec_).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace nestor
