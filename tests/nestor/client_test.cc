#include "nestor/client.h"

#include <string>

#include "gtest/gtest.h"

namespace nestor {
namespace {

TEST(BudgetTest, CarriesOnlyTheFlagsThatWereGiven) {
  BudgetFlags values;
  Flags flags("nestor test", "nestor test");
  AddBudgetFlags(&flags, &values);
  ASSERT_TRUE(
      flags.Parse({"--first-token-target", "200ms", "--max-cost", "0.6", "--level", "0"}).ok());
  const auto budget = BudgetOf(values);
  ASSERT_TRUE(budget.ok()) << budget.status();
  EXPECT_EQ(budget->first_token_target().seconds(), 0);
  EXPECT_EQ(budget->first_token_target().nanos(), 200000000);
  EXPECT_EQ(budget->max_cost(), 0.6);
  EXPECT_TRUE(budget->has_level());
  EXPECT_EQ(budget->level(), 0);
  EXPECT_FALSE(budget->has_latency_target());
  EXPECT_FALSE(budget->has_per_token_target());
  EXPECT_FALSE(budget->has_min_quality());
  EXPECT_FALSE(budget->has_priority());
}

TEST(BudgetTest, CarriesEveryField) {
  const auto budget = BudgetOf({.latency_target = absl::Milliseconds(1500),
                                .first_token_target = absl::Milliseconds(2),
                                .per_token_target = absl::Microseconds(3),
                                .max_cost = 0.25,
                                .min_quality = 0.5,
                                .level = 4,
                                .priority = 2});
  ASSERT_TRUE(budget.ok()) << budget.status();
  EXPECT_EQ(budget->ShortDebugString(),
            "latency_target { seconds: 1 nanos: 500000000 } "
            "first_token_target { nanos: 2000000 } per_token_target { nanos: 3000 } "
            "max_cost: 0.25 min_quality: 0.5 level: 4 priority: 2");
}

TEST(BudgetTest, RefusesALevelThatAMessageCannotHold) {
  BudgetFlags flags;
  flags.level = 1LL << 40;
  EXPECT_TRUE(IsUsageError(BudgetOf(flags).status()));
}

TEST(ProtoDurationTest, PartsShareTheSign) {
  const google::protobuf::Duration proto = ToProto(absl::Milliseconds(-1500));
  EXPECT_EQ(proto.seconds(), -1);
  EXPECT_EQ(proto.nanos(), -500000000);
  EXPECT_EQ(FromProto(proto), absl::Milliseconds(-1500));
}

TEST(ConnectionTest, UnavailableSaysWhereTheDaemonWasSought) {
  const Connection connection({.server = "127.0.0.1:1", .timeout = {}});
  const absl::Status status =
      connection.ToStatus(grpc::Status(grpc::StatusCode::UNAVAILABLE, "refused"));
  EXPECT_EQ(status, absl::UnavailableError("127.0.0.1:1: refused"));
}

TEST(ConnectionTest, OtherCodesComeThroughUnchanged) {
  const Connection connection({.server = "127.0.0.1:1", .timeout = {}});
  EXPECT_TRUE(connection.ToStatus(grpc::Status::OK).ok());
  EXPECT_EQ(connection.ToStatus(grpc::Status(grpc::StatusCode::FAILED_PRECONDITION, "too cheap")),
            absl::FailedPreconditionError("too cheap"));
}

TEST(ConnectionTest, TheTimeoutIsTheDeadline) {
  const Connection unlimited({.server = "127.0.0.1:1", .timeout = {}});
  EXPECT_EQ(unlimited.MakeContext()->deadline(), std::chrono::system_clock::time_point::max());
  const Connection limited({.server = "127.0.0.1:1", .timeout = absl::Hours(1)});
  EXPECT_LT(limited.MakeContext()->deadline(),
            std::chrono::system_clock::now() + std::chrono::hours(2));
}

}  // namespace
}  // namespace nestor
