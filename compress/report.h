#pragma once

#include <string>
#include <vector>

#include "engine/nested_model.h"
#include "nlohmann/json.hpp"

namespace nestor {

// Measured levels as a table with a header, for people.
std::string LevelTable(const std::vector<Level>& levels);

// The same as the list `levels` of --json: level, form, relative_cost, relative_flops, quality, and
// those of perplexity, spearman, quality_vs_source and standard_error that were measured.
nlohmann::json LevelReport(const std::vector<Level>& levels);

}  // namespace nestor
