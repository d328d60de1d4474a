#include "compress/options.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

absl::Status CheckSearch(const CompressOptions& options) {
  const RankSearchOptions& search = options.search;
  if (!options.delta.empty() && (!options.has_prefix() || options.ladder == LadderChoice::kMixed)) {
    return absl::InvalidArgumentError("delta: needs a prefix ladder");
  }
  if (!options.delta.empty() && !options.has_residual() &&
      (options.is_measured() || !search.costs.empty())) {
    return absl::InvalidArgumentError(
        "delta: names the levels of a prefix ladder itself; costs and a measured search may be "
        "given for a residual ladder beside it");
  }
  if (!options.has_prefix() && options.is_to_train()) {
    return absl::InvalidArgumentError(
        "gar levels: put off, but a residual ladder has no gar pairs");
  }
  if (!options.is_measured() && options.ladder == LadderChoice::kMixed) {
    return absl::InvalidArgumentError("search: a mixed ladder needs a measured search");
  }
  if (!options.is_measured() && search.objective == RankObjective::kTime) {
    return absl::InvalidArgumentError("search: time as the objective needs a measured search");
  }
  if (options.delta.empty()) {
    NESTOR_RETURN_IF_ERROR(CheckProbeTokens(options, options.corpus.calibration_tokens));
  }
  std::vector<double> costs = search.costs;
  std::sort(costs.begin(), costs.end());
  for (size_t i = 0; i < costs.size(); ++i) {
    if (!(costs[i] > 0 && costs[i] <= 1)) {
      return absl::InvalidArgumentError(absl::StrCat("costs: must be in (0, 1]; was ", costs[i]));
    }
    if (i > 0 && costs[i] == costs[i - 1]) {
      return absl::InvalidArgumentError(absl::StrCat("costs: ", costs[i], " is there twice"));
    }
  }
  if (!costs.empty() && costs.front() == 1) {
    return absl::InvalidArgumentError("costs: the full level costs 1; expected one that is below");
  }
  return absl::OkStatus();
}

absl::Status CheckExtraCosts(const CompressOptions& options) {
  if (!options.extra_costs.empty() && options.is_to_train()) {
    return absl::InvalidArgumentError(
        "extra costs: an artifact to train states other costs; expected them where its delta is "
        "applied");
  }
  const std::vector<std::string> ladders = NamesOf(options.ladder);
  std::set<std::pair<std::string, double>> seen;
  for (const auto& [named, cost] : options.extra_costs) {
    const auto error = [&, &named = named, &cost = cost](const std::string& what) {
      return absl::InvalidArgumentError(
          absl::StrCat("extra costs: ", named, named.empty() ? "" : ":", cost, ": ", what));
    };
    if (!(cost > 0 && cost < 1)) return error("must be in (0, 1)");
    const std::string ladder = named.empty() && ladders.size() == 1 ? ladders.front() : named;
    if (std::count(ladders.begin(), ladders.end(), ladder) == 0) {
      return error(
          absl::StrCat("expected one of the ladders before it: ", absl::StrJoin(ladders, " or ")));
    }
    if (!seen.emplace(ladder, cost).second) return error("is there twice");
  }
  return absl::OkStatus();
}

}  // namespace

std::vector<std::string> NamesOf(LadderChoice choice) {
  switch (choice) {
    case LadderChoice::kResidual:
      return {"residual"};
    case LadderChoice::kPrefix:
      return {"prefix"};
    case LadderChoice::kBoth:
      return {"residual", "prefix"};
    case LadderChoice::kMixed:
      return {"mixed"};
  }
  return {};
}

absl::Status CheckOptions(const CompressOptions& options) {
  if (options.levels < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("levels: must be positive; was ", options.levels));
  }
  // A delta may bring its own.
  if (options.corpus.calibration_paths.empty() && options.delta.empty()) {
    return absl::InvalidArgumentError("calibration: no text is given");
  }
  for (const auto& [name, value] :
       {std::pair("calibration tokens", options.corpus.calibration_tokens),
        std::pair("evaluation tokens", options.evaluation_tokens.value_or(1)),
        std::pair("probes", options.search.probes),
        std::pair("probe tokens", options.search.probe_tokens.value_or(1)),
        std::pair("rows", options.search.rows),
        std::pair("threads", static_cast<int64_t>(options.threads)),
        std::pair("maximum residual rank", options.max_residual_rank),
        std::pair("maximum residual rank of the head", options.max_head_residual_rank)}) {
    if (value < 1) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": must be positive; was ", value));
    }
  }
  if (options.self_sample_tokens.value_or(0) < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokens to sample: must not be negative; was ", *options.self_sample_tokens));
  }
  if (options.refit_tokens.value_or(0) < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("refit tokens: must not be negative; was ", *options.refit_tokens));
  }
  if (!options.delta.empty() && options.tokens_to_refit_on() > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("refit tokens: ", options.tokens_to_refit_on(),
                     ", but a delta's terms were trained beside factors that are not refitted"));
  }
  if (options.delta.empty()) {
    const std::vector<double>& costs = options.search.costs;
    const int64_t below_full = std::ssize(costs) - std::count(costs.begin(), costs.end(), 1);
    NESTOR_RETURN_IF_ERROR(CheckGarLevels(options, costs.empty() ? options.levels : below_full));
  }
  NESTOR_RETURN_IF_ERROR(CheckExtraCosts(options));
  return CheckSearch(options);
}

absl::Status CheckGarLevels(const CompressOptions& options, int64_t count) {
  if (!options.gar_levels.has_value()) return absl::OkStatus();
  for (const int level : *options.gar_levels) {
    if (!options.has_prefix()) {
      return absl::InvalidArgumentError(
          absl::StrCat("gar levels: ", level, ", but a residual ladder has no gar pairs"));
    }
    if (level < 0 || level >= count) {
      return absl::InvalidArgumentError(absl::StrCat("gar levels: expected 0 to ", count - 1,
                                                     ", from the ladder's cheapest; was ", level));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckProbeTokens(const CompressOptions& options, int64_t calibration_tokens) {
  const int64_t tokens = options.search.probe_tokens.value_or(0);
  if (tokens <= calibration_tokens) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("probe tokens: ", tokens, " of only ",
                                                 calibration_tokens, " calibration tokens"));
}

}  // namespace nestor
