#include "nestor/flags.h"

#include <optional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

struct FlagsTest : public ::testing::Test {
  FlagsTest() : flags("nestor test TEXT", "nestor test --count 3 hello") {
    flags.Add("verbose", &verbose, "says more");
    flags.Add("count", &count, "how many");
    flags.Add("ratio", &ratio, "a share");
    flags.Add("name", &name, "a name");
    flags.Add("seed", &seed, "a seed");
    flags.Add("max-cost", &max_cost, "a ceiling");
    flags.Add("file", &file, "a file");
    flags.Add("wait", &wait, "a time");
    flags.Add("stop", &stop, "a text");
  }

  Flags flags;
  bool verbose = false;
  int64_t count = 7;
  double ratio = 0.5;
  std::string name = "anon";
  std::optional<int64_t> seed;
  std::optional<double> max_cost;
  std::optional<std::string> file;
  std::optional<absl::Duration> wait;
  std::vector<std::string> stop;
};

TEST_F(FlagsTest, TakesBothSpellingsOfEveryType) {
  const auto positional = flags.Parse({"--verbose", "a", "--count=-3", "--ratio", "0.25", "--name",
                                       "", "--seed", "9", "--max-cost=0.6", "--file", "-", "--wait",
                                       "1.5s", "--stop", "x", "--stop=y", "b"});
  ASSERT_TRUE(positional.ok()) << positional.status();
  EXPECT_THAT(*positional, ElementsAre("a", "b"));
  EXPECT_TRUE(verbose);
  EXPECT_EQ(count, -3);
  EXPECT_EQ(ratio, 0.25);
  EXPECT_EQ(name, "");
  EXPECT_EQ(seed, 9);
  EXPECT_EQ(max_cost, 0.6);
  EXPECT_EQ(file, "-");
  EXPECT_EQ(wait, absl::Milliseconds(1500));
  EXPECT_THAT(stop, ElementsAre("x", "y"));
}

TEST_F(FlagsTest, WithoutFlagsTheDefaultsStay) {
  const auto positional = flags.Parse({});
  ASSERT_TRUE(positional.ok()) << positional.status();
  EXPECT_THAT(*positional, IsEmpty());
  EXPECT_FALSE(verbose);
  EXPECT_EQ(count, 7);
  EXPECT_EQ(name, "anon");
  EXPECT_FALSE(seed.has_value());
  EXPECT_FALSE(wait.has_value());
}

TEST_F(FlagsTest, ANegativeNumberIsAValue) {
  ASSERT_TRUE(flags.Parse({"--count", "-3", "--max-cost", "-0.5"}).ok());
  EXPECT_EQ(count, -3);
  EXPECT_EQ(max_cost, -0.5);
}

TEST_F(FlagsTest, ABoolCanBeSwitchedOff) {
  verbose = true;
  ASSERT_TRUE(flags.Parse({"--verbose=false"}).ok());
  EXPECT_FALSE(verbose);
}

TEST_F(FlagsTest, TwoDashesEndTheFlags) {
  const auto positional = flags.Parse({"--count", "1", "--", "--count", "-x"});
  ASSERT_TRUE(positional.ok()) << positional.status();
  EXPECT_THAT(*positional, ElementsAre("--count", "-x"));
  EXPECT_EQ(count, 1);
}

TEST_F(FlagsTest, ALoneDashIsAnArgument) {
  const auto positional = flags.Parse({"-"});
  ASSERT_TRUE(positional.ok()) << positional.status();
  EXPECT_THAT(*positional, ElementsAre("-"));
}

struct BadLine {
  std::vector<std::string> arguments;
  std::string message;
};
void PrintTo(const BadLine& line, std::ostream* out) { *out << line.message; }

class BadLineTest : public FlagsTest, public ::testing::WithParamInterface<BadLine> {};

TEST_P(BadLineTest, IsAUsageErrorThatNamesTheFlag) {
  const absl::Status status = flags.Parse(GetParam().arguments).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(IsUsageError(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, BadLineTest,
    ::testing::Values(BadLine{{"--colour"}, "unknown flag --colour"},
                      BadLine{{"--colour=red"}, "unknown flag --colour"},
                      BadLine{{"-v"}, "unknown flag -v"},
                      BadLine{{"--count"}, "--count needs a value"},
                      BadLine{{"--file", "--verbose"}, "--file needs a value"},
                      BadLine{{"--count", "3", "--count=4"}, "--count is given twice"},
                      BadLine{{"--count", "3.5"}, "--count: expected an integer; was \"3.5\""},
                      BadLine{{"--seed="}, "--seed: expected an integer; was \"\""},
                      BadLine{{"--ratio", "half"}, "--ratio: expected a number; was \"half\""},
                      BadLine{{"--max-cost", "0,6"}, "--max-cost: expected a number; was \"0,6\""},
                      BadLine{{"--verbose=maybe"},
                              "--verbose: expected true or false; was \"maybe\""},
                      BadLine{{"--wait", "200"}, "--wait: expected a duration with its unit"},
                      BadLine{{"--wait", "inf"}, "was \"inf\""}));

TEST_F(FlagsTest, HelpShowsEveryFlagItsDefaultAndTheExample) {
  const absl::Status status = flags.Parse({"--count", "3", "--help"}).status();
  EXPECT_TRUE(IsHelpRequest(status));
  EXPECT_FALSE(IsUsageError(status));
  const std::string help(status.message());
  EXPECT_THAT(help, HasSubstr("Usage: nestor test TEXT\n"));
  EXPECT_THAT(help, HasSubstr("--ratio NUMBER "));
  EXPECT_THAT(help, HasSubstr("a share (default: 0.5)"));
  EXPECT_THAT(help, HasSubstr("--wait DURATION "));
  EXPECT_THAT(help, HasSubstr("a time\n"));
  EXPECT_THAT(help, HasSubstr("Example:\n  nestor test --count 3 hello\n"));
}

TEST(UsageErrorTest, OtherInvalidArgumentsAreNone) {
  EXPECT_FALSE(IsUsageError(absl::InvalidArgumentError("from a server")));
  EXPECT_FALSE(IsUsageError(absl::OkStatus()));
  EXPECT_FALSE(IsHelpRequest(absl::CancelledError("by a client")));
}

TEST(DurationFlagTest, TakesUnits) {
  EXPECT_EQ(*ParseDurationFlag("wait", "200ms"), absl::Milliseconds(200));
  EXPECT_EQ(*ParseDurationFlag("wait", "1m30s"), absl::Seconds(90));
  EXPECT_EQ(*ParseDurationFlag("wait", "0"), absl::ZeroDuration());
  EXPECT_EQ(*ParseDurationFlag("wait", "-5us"), absl::Microseconds(-5));
}

TEST(DurationFlagTest, RefusesWhatHasNoEnd) {
  EXPECT_FALSE(ParseDurationFlag("wait", "-inf").ok());
  EXPECT_FALSE(ParseDurationFlag("wait", "soon").ok());
}

TEST(ToInt32Test, RefusesWhatAFieldCannotHold) {
  EXPECT_EQ(*ToInt32("level", 2147483647), 2147483647);
  EXPECT_EQ(*ToInt32("level", -2147483648LL), -2147483647 - 1);
  const absl::Status status = ToInt32("level", 2147483648LL).status();
  EXPECT_TRUE(IsUsageError(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("--level"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("2147483648"));
}

}  // namespace
}  // namespace nestor
