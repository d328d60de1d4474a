#include "compress/options.h"

#include <functional>
#include <ostream>
#include <string>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace nestor {
namespace {

using ::testing::HasSubstr;

CompressOptions Good() {
  CompressOptions options;
  options.ladder = LadderChoice::kBoth;
  options.corpus.calibration_paths = {"text.txt"};
  options.corpus.calibration_tokens = 4096;
  return options;
}

struct Case {
  std::string name;
  std::function<void(CompressOptions*)> damage;
  std::string message;
};
void PrintTo(const Case& value, std::ostream* out) { *out << value.name; }

class CheckOptionsTest : public testing::TestWithParam<Case> {};

TEST_P(CheckOptionsTest, NamesWhatIsWrong) {
  CompressOptions options = Good();
  ASSERT_TRUE(CheckOptions(options).ok());
  GetParam().damage(&options);
  const absl::Status status = CheckOptions(options);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    All, CheckOptionsTest,
    testing::Values(
        Case{"NoLevels", [](auto* o) { o->levels = 0; }, "levels: must be positive; was 0"},
        Case{"NoText", [](auto* o) { o->corpus.calibration_paths.clear(); }, "no text is given"},
        Case{"NoCalibration", [](auto* o) { o->corpus.calibration_tokens = 0; },
             "calibration tokens: must be positive; was 0"},
        Case{"NoEvaluation", [](auto* o) { o->evaluation_tokens = -1; },
             "evaluation tokens: must be positive; was -1"},
        Case{"NoThread", [](auto* o) { o->threads = 0; }, "threads: must be positive; was 0"},
        Case{"NoProbe", [](auto* o) { o->search.probes = 0; }, "probes: must be positive; was 0"},
        Case{"NoRow", [](auto* o) { o->search.rows = 0; }, "rows: must be positive; was 0"},
        Case{"NegativeSample", [](auto* o) { o->self_sample_tokens = -5; },
             "tokens to sample: must not be negative; was -5"},
        Case{"NegativeRefit", [](auto* o) { o->refit_tokens = -5; },
             "refit tokens: must not be negative; was -5"},
        Case{"RefitBesideADelta",
             [](auto* o) {
               o->delta = "delta";
               o->refit_tokens = 512;
             },
             "refit tokens: 512, but a delta's terms"},
        Case{"GarLevelAboveTheLadder",
             [](auto* o) {
               o->gar_levels = {0, 6};
             },
             "gar levels: expected 0 to 5, from the ladder's cheapest; was 6"},
        Case{"GarLevelAboveTheCosts",
             [](auto* o) {
               o->search.costs = {0.8, 1, 0.6};  // two below the full level
               o->gar_levels = {2};
             },
             "gar levels: expected 0 to 1, from the ladder's cheapest; was 2"},
        Case{"GarLevelOfAResidualLadder",
             [](auto* o) {
               o->ladder = LadderChoice::kResidual;
               o->gar_levels = {0};
             },
             "a residual ladder has no gar pairs"},
        Case{"PairsPutOffInAResidualLadder",
             [](auto* o) {
               o->ladder = LadderChoice::kResidual;
               o->makes_gar_pairs = false;
             },
             "gar levels: put off"},
        Case{"DeltaOfAResidualLadder",
             [](auto* o) {
               o->ladder = LadderChoice::kResidual;
               o->delta = "delta";
             },
             "delta: needs a prefix ladder"},
        Case{"CostsBesideADelta",
             [](auto* o) {
               o->ladder = LadderChoice::kPrefix;
               o->delta = "delta";
               o->search.costs = {0.5};
             },
             "delta: names the levels of a prefix ladder itself"},
        Case{"MixedWithoutMeasuring", [](auto* o) { o->ladder = LadderChoice::kMixed; },
             "a mixed ladder needs a measured search"},
        Case{"TimeWithoutMeasuring", [](auto* o) { o->search.objective = RankObjective::kTime; },
             "time as the objective needs a measured search"},
        Case{"MoreProbeTokensThanCalibration",
             [](auto* o) {
               o->corpus.calibration_tokens = 512;
               o->search.probe_tokens = 513;
             },
             "probe tokens: 513 of only 512 calibration tokens"},
        Case{"CostAboveOne",
             [](auto* o) {
               o->search.costs = {0.5, 1.5};
             },
             "costs: must be in (0, 1]; was 1.5"},
        Case{"CostTwice",
             [](auto* o) {
               o->search.costs = {0.5, 0.7, 0.5};
             },
             "costs: 0.5 is there twice"},
        Case{"ExtraCostOfNoLadder",
             [](auto* o) {
               o->extra_costs = {{"mixed", 0.7}};
             },
             "extra costs: mixed:0.7: expected one of the ladders before it: residual or prefix"},
        Case{"ExtraCostOfOneOfTwoLadders",
             [](auto* o) {
               o->extra_costs = {{"", 0.7}};
             },
             "extra costs: 0.7: expected one of the ladders before it"},
        Case{"ExtraCostTwice",
             [](auto* o) {
               o->ladder = LadderChoice::kResidual;
               o->extra_costs = {{"", 0.7}, {"residual", 0.7}};
             },
             "extra costs: residual:0.7: is there twice"},
        Case{"ExtraCostOfTheFullLevel",
             [](auto* o) {
               o->extra_costs = {{"prefix", 1}};
             },
             "extra costs: prefix:1: must be in (0, 1)"},
        Case{"ExtraCostToTrain",
             [](auto* o) {
               o->makes_gar_pairs = false;
               o->extra_costs = {{"prefix", 0.7}};
             },
             "extra costs: an artifact to train states other costs"},
        Case{"FullLevelAlone", [](auto* o) { o->search.costs = {1}; },
             "costs: the full level costs 1"}),
    [](const testing::TestParamInfo<Case>& test) { return test.param.name; });

}  // namespace
}  // namespace nestor
