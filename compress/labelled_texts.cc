#include "compress/labelled_texts.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "base/file.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

struct Row {
  int64_t line = 0;  // where it begins
  std::vector<std::string> columns;
};

std::vector<Row> SplitTabs(const std::string& text) {
  std::vector<Row> rows;
  int64_t number = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    const absl::string_view content = absl::StripSuffix(line, "\r");
    if (!content.empty()) rows.push_back({number, absl::StrSplit(content, '\t')});
  }
  return rows;
}

// RFC 4180: a field in quotes may hold commas, line breaks and doubled quotes.
absl::StatusOr<std::vector<Row>> SplitCommas(const std::string& path, const std::string& text) {
  std::vector<Row> rows;
  Row row{.line = 1, .columns = {""}};
  bool is_quoted = false;
  int64_t line = 1;
  const auto end_row = [&] {
    if (row.columns.size() > 1 || !row.columns[0].empty()) rows.push_back(std::move(row));
    row = {.line = line, .columns = {""}};
  };
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '\n') ++line;
    if (is_quoted) {
      if (c != '"') {
        row.columns.back() += c;
      } else if (i + 1 < text.size() && text[i + 1] == '"') {
        row.columns.back() += text[++i];
      } else {
        is_quoted = false;
      }
    } else if (c == '"' && row.columns.back().empty()) {
      is_quoted = true;
    } else if (c == ',') {
      row.columns.emplace_back();
    } else if (c == '\n') {
      end_row();
    } else if (c != '\r') {
      row.columns.back() += c;
    }
  }
  if (is_quoted) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": line ", row.line, ": a quote that does not end"));
  }
  end_row();
  return rows;
}

std::optional<size_t> ClassOf(const std::string& label, const std::vector<std::string>& labels) {
  const auto found = std::find(labels.begin(), labels.end(), label);
  if (found != labels.end()) return static_cast<size_t>(found - labels.begin());
  size_t number = 0;
  if (absl::SimpleAtoi(label, &number) && number < labels.size()) return number;
  return std::nullopt;
}

// The text, or both with their special tokens, at most `max_tokens` together.
absl::Status AddText(const std::vector<std::string>& texts, const Tokenizer& tokenizer,
                     size_t max_tokens, EvaluationSet* set) {
  std::vector<std::vector<int32_t>> parts;
  for (const std::string& text : texts) {
    NESTOR_ASSIGN_OR_RETURN(parts.emplace_back(),
                            tokenizer.Encode(text, /*adds_special_tokens=*/true));
  }
  // A second text goes without the token that begins the first.
  if (parts.size() > 1) parts[1].erase(parts[1].begin());
  const auto total = [&] { return parts[0].size() + (parts.size() > 1 ? parts[1].size() : 0); };
  while (total() > max_tokens) {
    std::vector<int32_t>& longer =
        parts.size() > 1 && parts[1].size() > parts[0].size() ? parts[1] : parts[0];
    longer.erase(longer.end() - 2);  // the last one ends the text
  }
  set->second_texts.push_back(parts[0].size());
  if (parts.size() > 1) parts[0].insert(parts[0].end(), parts[1].begin(), parts[1].end());
  set->sequences.push_back(std::move(parts[0]));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<EvaluationSet> ReadLabelledTexts(const std::string& path, const Tokenizer& tokenizer,
                                                const ModelSpec& spec) {
  NESTOR_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::vector<Row> rows;
  if (absl::EndsWith(path, ".tsv")) {
    rows = SplitTabs(text);
  } else {
    NESTOR_ASSIGN_OR_RETURN(rows, SplitCommas(path, text));
  }
  if (!rows.empty() && absl::EqualsIgnoreCase(rows[0].columns.back(), "label")) {
    rows.erase(rows.begin());
  }
  if (rows.empty()) return absl::InvalidArgumentError(absl::StrCat(path, ": no texts"));
  const std::vector<std::string>& labels = spec.classifier.labels;
  const size_t num_columns = rows[0].columns.size();
  EvaluationSet set;
  for (Row& row : rows) {
    const auto error = [&](const std::string& what) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": line ", row.line, ": ", what));
    };
    if (row.columns.size() != num_columns || num_columns < 2 || num_columns > 3) {
      return error(absl::StrCat(row.columns.size(),
                                " columns, expected text, label, or text, second text, label"));
    }
    const std::string label(absl::StripAsciiWhitespace(row.columns.back()));
    const std::optional<size_t> number = ClassOf(label, labels);
    if (!number.has_value()) {
      return error(absl::StrCat("label \"", label, "\", expected ", absl::StrJoin(labels, ", "),
                                ", or a number up to ", labels.size() - 1));
    }
    if (num_columns == 3 && spec.num_token_types < 2) {
      return error("a second text, but the model tells no second text from a first");
    }
    row.columns.pop_back();
    set.classes.push_back(*number);
    NESTOR_RETURN_IF_ERROR(
        AddText(row.columns, tokenizer,
                static_cast<size_t>(std::min(spec.context_length, kWindowTokens)), &set));
  }
  return set;
}

}  // namespace nestor
