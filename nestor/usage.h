#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "nestor/v1/inference.pb.h"
#include "nlohmann/json.hpp"

namespace nestor {

// When the tokens of one stream reached the client. Times are since the request was sent.
class StreamTiming {
 public:
  // REQUIRES: `elapsed` does not fall from call to call.
  void Record(absl::Duration elapsed, int64_t num_tokens);

  std::optional<absl::Duration> time_to_first_token() const { return first_; }
  // Tokens that came after the first message, over the time after it: decoding speed without the
  // prompt's share. Absent where nothing came later.
  std::optional<double> tokens_per_second() const;

 private:
  std::optional<absl::Duration> first_;
  absl::Duration last_;
  int64_t tokens_after_first_ = 0;
};

// Tokens that reached the client together, `elapsed` after the streams' common start.
struct TokenArrival {
  absl::Duration elapsed;
  int64_t tokens = 0;
};

// Joint speed of several streams while all of them run: from the last one's first arrival to the
// first one's last. Absent where that leaves no time. REQUIRES: `streams` is not empty.
std::optional<double> JointTokensPerSecond(const std::vector<std::vector<TokenArrival>>& streams);

// Every field of a Usage, times in seconds: {"prompt_levels": [{"level", "tokens"}], ...}.
// `target_met` is null where no target was given.
nlohmann::json ToJson(const v1::Usage& usage);
// The same with "tokens_per_second" and "time_to_first_token_seconds", null where unknown.
nlohmann::json ToJson(const v1::Usage& usage, const StreamTiming& timing);

// "level 2 | relative cost 0.566 | expected quality 0.944", then what applies of relative FLOPs
// (`shows_flops`), degradation and missed targets.
std::string UsageLine(const v1::Usage& usage, bool shows_flops);
// The same with "128 tokens/s | first token 35 ms".
std::string UsageLine(const v1::Usage& usage, const StreamTiming& timing);

// The usage of several requests as one: run lengths concatenated, counts and times added, means
// weighted by tokens, degraded if any was, targets met if all were.
// REQUIRES: `parts` is not empty.
v1::Usage Merge(const std::vector<v1::Usage>& parts);

// "stop", "length", "drain".
std::string NameOf(v1::FinishReason reason);

}  // namespace nestor
