#pragma once

#include <string>
#include <vector>

namespace nestor {

// Right-aligned columns under their titles, for people; scripts take --json.
class TextTable {
 public:
  explicit TextTable(std::vector<std::string> titles);
  // REQUIRES: one cell for each title.
  void AddRow(std::vector<std::string> cells);
  std::string Render() const;

 private:
  std::vector<std::vector<std::string>> rows_;  // the titles first
};

}  // namespace nestor
