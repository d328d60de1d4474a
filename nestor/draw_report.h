#pragma once

#include <string>

#include "absl/status/status.h"
#include "nlohmann/json.hpp"

namespace nestor {

// Writes `report` (compress/report.h) to DIRECTORY/report.json, making the directory where it is
// absent, and has scripts/report.py draw report.html and its pictures beside it. Says on stderr
// what it did: where no Python with matplotlib is found, that nothing was drawn and by which
// command it can be. That is no failure; one is only what keeps report.json from being written.
absl::Status WriteReport(const nlohmann::json& report, const std::string& directory);

}  // namespace nestor
