#include "compress/probe.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <filesystem>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "base/file.h"
#include "base/progress.h"
#include "base/status_macros.h"
#include "compress/divergence.h"
#include "compress/rank_search.h"
#include "nlohmann/json.hpp"

namespace nestor {
namespace {

using Json = nlohmann::json;

// Where a single probe stands: a residual's rank, and a prefix's as share of the largest.
constexpr double kSingleResidualRank = 16;
constexpr double kSinglePrefixShare = 0.4;
// The least prefix rank that several probes begin at, as share of the largest.
constexpr double kLeastPrefixShare = 0.125;
// Residual ranks begin at 0, so those of several probes are geometric in the rank plus this.
constexpr double kResidualOffset = 8;
// Losses and energies below are rounding.
constexpr double kFloor = 1e-12;

// The ranks, not rounded to options, that `count` probes of a form aim at.
std::vector<double> RanksAimedAt(Form form, double least, double largest, int64_t count) {
  const bool is_residual = form == Form::kResidual;
  if (count == 1) return {is_residual ? kSingleResidualRank : kSinglePrefixShare * largest};
  const double offset = is_residual ? kResidualOffset : 0;
  const double begin = offset + (is_residual ? least : kLeastPrefixShare * largest);
  std::vector<double> ranks;
  for (int64_t i = 0; i < count; ++i) {
    const double share = static_cast<double>(i) / static_cast<double>(count - 1);
    ranks.push_back(begin * std::pow((offset + largest) / begin, share) - offset);
  }
  return ranks;
}

void AddProbes(size_t layer, std::vector<LayerOption> options, int64_t count,
               std::vector<Probe>* probes) {
  if (options.size() == 1) {
    probes->push_back({.layer = layer, .choice = options[0].choice, .energy = options[0].error});
  }
  if (options.size() < 2) return;
  std::sort(options.begin(), options.end(), [](const LayerOption& a, const LayerOption& b) {
    return a.choice.rank < b.choice.rank;
  });
  const auto rank_of = [&](size_t i) { return static_cast<double>(options[i].choice.rank); };
  int64_t last = -1;
  for (const double rank :
       RanksAimedAt(options[0].choice.form, rank_of(0), rank_of(options.size() - 1), count)) {
    const LayerOption& nearest = *std::min_element(
        options.begin(), options.end(), [&](const LayerOption& a, const LayerOption& b) {
          return std::fabs(static_cast<double>(a.choice.rank) - rank) <
                 std::fabs(static_cast<double>(b.choice.rank) - rank);
        });
    if (nearest.choice.rank == last) continue;
    last = nearest.choice.rank;
    probes->push_back({.layer = layer, .choice = nearest.choice, .energy = nearest.error});
  }
}

// Loss at `energy` by the probes of one form of a layer, in ascending energy.
double LossAt(const std::vector<Probe>& probes, double energy) {
  const double x = std::max(energy, kFloor);
  const auto above = std::find_if(probes.begin(), probes.end(),
                                  [&](const Probe& probe) { return probe.energy >= energy; });
  const auto energy_of = [](const Probe& probe) { return std::max(probe.energy, kFloor); };
  if (above == probes.begin()) return above->loss * x / energy_of(*above);
  const Probe& low = *(above - 1);
  if (above == probes.end()) return low.loss * x / energy_of(low);
  const double low_loss = std::max(low.loss, kFloor);
  const double high_loss = std::max(above->loss, kFloor);
  const double width = std::log(energy_of(*above) / energy_of(low));
  const double share = width > 0 ? std::log(x / energy_of(low)) / width : 1;
  return low_loss * std::pow(high_loss / low_loss, share);
}

}  // namespace

std::vector<Probe> ChooseProbes(const LayerOptions& options, int64_t count) {
  std::vector<Probe> probes;
  for (size_t layer = 0; layer < options.size(); ++layer) {
    for (const Form form : {Form::kResidual, Form::kMiddle, Form::kPrefix}) {
      std::vector<LayerOption> of_form;
      std::copy_if(options[layer].begin(), options[layer].end(), std::back_inserter(of_form),
                   [&](const LayerOption& option) { return option.choice.form == form; });
      AddProbes(layer, std::move(of_form), count, &probes);
    }
  }
  return probes;
}

std::vector<Level> ProbeLevels(const std::vector<Probe>& probes, size_t num_layers) {
  std::vector<Level> levels;
  for (const Probe& probe : probes) {
    Level level;
    level.ladder = NameOf(probe.choice.form);
    level.profile.resize(num_layers);
    level.profile[probe.layer] = probe.choice;
    levels.push_back(std::move(level));
  }
  Level full;
  full.ladder = "full";
  full.profile.resize(num_layers);
  levels.push_back(std::move(full));
  return levels;
}

absl::StatusOr<ProbeLog> ProbeLog::Open(const std::string& path, const std::string& key) {
  ProbeLog log(path);
  const Json header = {{"key", key}};
  std::string kept = header.dump() + "\n";
  const absl::StatusOr<std::string> text = ReadFile(path);
  if (text.ok() && text->substr(0, kept.size()) == kept) {
    const std::vector<std::string> lines =
        absl::StrSplit(text->substr(kept.size()), '\n', absl::SkipEmpty());
    for (const std::string& line : lines) {
      const Json entry = Json::parse(line, nullptr, /*allow_exceptions=*/false);
      const auto is_count = [&](const char* name) {
        return entry.contains(name) && entry[name].is_number_unsigned();
      };
      if (!entry.is_object() || !is_count("layer") || !is_count("form") || !is_count("rank") ||
          !entry.contains("loss") || !entry["loss"].is_number()) {
        break;
      }
      const Probe probe = {.layer = entry["layer"],
                           .choice = {static_cast<Form>(entry["form"].get<int>()), entry["rank"]}};
      log.losses_[{probe.layer, probe.choice.form, probe.choice.rank}] = entry["loss"];
      kept += line + "\n";
    }
  }
  NESTOR_RETURN_IF_ERROR(WriteFileAtomically(path, kept));
  log.file_.open(path, std::ios::app);
  if (!log.file_) return FileError(path, errno);
  return log;
}

const double* ProbeLog::Find(const Probe& probe) const {
  const auto found = losses_.find({probe.layer, probe.choice.form, probe.choice.rank});
  return found == losses_.end() ? nullptr : &found->second;
}

absl::Status ProbeLog::Add(const Probe& probe) {
  losses_[{probe.layer, probe.choice.form, probe.choice.rank}] = probe.loss;
  const Json entry = {{"layer", probe.layer},
                      {"form", static_cast<int>(probe.choice.form)},
                      {"rank", probe.choice.rank},
                      {"loss", probe.loss}};
  errno = 0;
  file_ << entry.dump() << "\n" << std::flush;
  return file_ ? absl::OkStatus() : FileError(path_, errno != 0 ? errno : EIO);
}

absl::StatusOr<int64_t> MeasureProbes(Engine* engine, const TokenSequences& sequences,
                                      std::vector<Probe>* probes, ProbeLog* log) {
  int64_t resumed = 0;
  for (Probe& probe : *probes) {
    const double* const found = log->Find(probe);
    if (found != nullptr) probe.loss = *found;
    resumed += found != nullptr ? 1 : 0;
  }
  const int64_t left = static_cast<int64_t>(probes->size()) - resumed;
  if (left == 0) return resumed;
  Progress progress("Probing layers", (left + 1) * CountTokens(sequences));
  const int full = static_cast<int>(probes->size());
  NESTOR_ASSIGN_OR_RETURN(const Outputs whole, OutputsAt(engine, sequences, full, &progress));
  if (whole.size() < kMinOutputs) {
    return absl::InvalidArgumentError(
        absl::StrCat("too little calibration text to probe layers: ", whole.size(), " ",
                     engine->model().spec().is_encoder() ? "sentences" : "tokens",
                     ", needs at least ", kMinOutputs));
  }
  for (size_t i = 0; i < probes->size(); ++i) {
    Probe& probe = (*probes)[i];
    if (log->Find(probe) != nullptr) continue;
    NESTOR_ASSIGN_OR_RETURN(const Outputs outputs,
                            OutputsAt(engine, sequences, static_cast<int>(i), &progress));
    probe.loss = DivergenceOf(engine->model().spec(), whole, outputs);
    NESTOR_RETURN_IF_ERROR(log->Add(probe));
  }
  return resumed;
}

void ErrorsFromProbes(const std::vector<Probe>& probes, LayerOptions* options) {
  LayerOptions measured(options->size());
  for (const Probe& probe : probes) {
    measured[probe.layer].push_back({.choice = probe.choice, .error = probe.loss});
  }
  RepairMonotony(&measured);
  std::vector<std::map<Form, std::vector<Probe>>> by_form(options->size());
  std::vector<size_t> next(options->size(), 0);
  for (Probe probe : probes) {
    probe.loss = measured[probe.layer][next[probe.layer]++].error;
    by_form[probe.layer][probe.choice.form].push_back(probe);
  }
  for (size_t layer = 0; layer < options->size(); ++layer) {
    for (auto& [form, of_form] : by_form[layer]) {
      std::sort(of_form.begin(), of_form.end(),
                [](const Probe& a, const Probe& b) { return a.energy < b.energy; });
    }
    for (LayerOption& option : (*options)[layer]) {
      if (option.choice.form == Form::kDense) continue;
      option.error = LossAt(by_form[layer].at(option.choice.form), option.error);
    }
  }
}

}  // namespace nestor
