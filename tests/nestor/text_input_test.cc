#include "nestor/text_input.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nestor/flags.h"

namespace nestor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(ReadTextTest, TakesTheOneArgument) {
  EXPECT_EQ(*ReadText({"hello"}, std::nullopt, "file"), "hello");
}

TEST(ReadTextTest, NeedsExactlyOneSource) {
  EXPECT_TRUE(IsUsageError(ReadText({}, std::nullopt, "file").status()));
  EXPECT_TRUE(IsUsageError(ReadText({"a", "b"}, std::nullopt, "file").status()));
  EXPECT_TRUE(IsUsageError(ReadText({"a"}, "/dev/null", "file").status()));
}

TEST(ReadTextTest, AMissingFileIsNoUsageErrorAndIsNamed) {
  const absl::Status status = ReadText({}, "/nonexistent/prompt.txt", "file").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(IsUsageError(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("/nonexistent/prompt.txt"));
}

TEST(ReadTextTest, RefusesWhatIsNotUtf8) {
  const absl::Status status = ReadText({"caf\xe9"}, std::nullopt, "file").status();
  EXPECT_EQ(status, absl::InvalidArgumentError("the text: is not UTF-8"));
  EXPECT_EQ(*ReadText({"caf\xc3\xa9"}, std::nullopt, "file"), "caf\xc3\xa9");
}

TEST(NonEmptyLinesTest, TakesEveryLineEnd) {
  EXPECT_THAT(NonEmptyLines("one\r\n\ntwo words\nlast"), ElementsAre("one", "two words", "last"));
  EXPECT_THAT(NonEmptyLines("\n\r\n"), IsEmpty());
}

TEST(ParseIntegersTest, TakesAList) {
  EXPECT_THAT(*ParseIntegers("rows", "1,4,16", 1, 16), ElementsAre(1, 4, 16));
  EXPECT_THAT(*ParseIntegers("rows", "8", 1, 16), ElementsAre(8));
}

TEST(ParseIntegersTest, NamesTheFlagTheRangeAndTheEntry) {
  for (const std::string text : {"1,17", "0", "1,,4", "", "1,x", "2.5"}) {
    const absl::Status status = ParseIntegers("rows", text, 1, 16).status();
    EXPECT_TRUE(IsUsageError(status)) << text;
    EXPECT_THAT(std::string(status.message()), HasSubstr("--rows: expected integers from 1 to 16"));
  }
  EXPECT_THAT(std::string(ParseIntegers("rows", "1,17", 1, 16).status().message()),
              HasSubstr("\"17\""));
}

}  // namespace
}  // namespace nestor
