#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "compress/evaluate.h"

namespace nestor {

// Reads texts with the classes of a classifier: a table of two columns, text and label, or three,
// text, second text and label. A label is one of the model's names or its number. A name that ends
// in .tsv has tabs between its columns and nothing quoted (GLUE's format); any other has commas and
// RFC 4180's quotes. A first line whose last column is "label" is a header. Texts that are longer
// than the model's context are cut at their ends, the longer of a pair first.
// INVALID_ARGUMENT names the file and the line. REQUIRES: spec.is_classifier().
absl::StatusOr<EvaluationSet> ReadLabelledTexts(const std::string& path, const Tokenizer& tokenizer,
                                                const ModelSpec& spec);

}  // namespace nestor
