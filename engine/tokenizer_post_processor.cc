#include "engine/tokenizer_post_processor.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace nestor {
namespace {

absl::Status AppendId(const JsonField& field, std::vector<int32_t>* ids) {
  NESTOR_ASSIGN_OR_RETURN(const int64_t id, field.AsInt());
  if (id < 0 || id > INT32_MAX) return field.Error(absl::StrCat("out of range; was ", id));
  ids->push_back(static_cast<int32_t>(id));
  return absl::OkStatus();
}

absl::StatusOr<SpecialTokenFrame> ParseTemplate(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> parts, field.Member("single").Entries());
  SpecialTokenFrame frame;
  bool is_after_text = false;
  for (const JsonField& part : parts) {
    if (!part.Member("Sequence").is_null()) {
      if (is_after_text) return part.Error("the text stands more than once: not supported");
      is_after_text = true;
      continue;
    }
    NESTOR_ASSIGN_OR_RETURN(const std::string name, part.Member("SpecialToken").GetString("id"));
    NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> ids,
                            field.Member("special_tokens").Member(name).Member("ids").Entries());
    for (const JsonField& id : ids) {
      NESTOR_RETURN_IF_ERROR(AppendId(id, is_after_text ? &frame.after : &frame.before));
    }
  }
  if (!is_after_text) return field.Member("single").Error("has no place for the text");
  return frame;
}

// {"cls": ["[CLS]", 101], "sep": ["[SEP]", 102]}
absl::StatusOr<SpecialTokenFrame> ParseClassifierFrame(const JsonField& field) {
  SpecialTokenFrame frame;
  for (const char* name : {"cls", "sep"}) {
    NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> pair, field.Member(name).Entries());
    if (pair.size() != 2) return field.Member(name).Error("must be a token and its id");
    NESTOR_RETURN_IF_ERROR(AppendId(pair[1], name[0] == 'c' ? &frame.before : &frame.after));
  }
  return frame;
}

// Each processor frames what the one before it made.
absl::StatusOr<SpecialTokenFrame> ParseSequence(const JsonField& field) {
  NESTOR_ASSIGN_OR_RETURN(const std::vector<JsonField> entries,
                          field.Member("processors").Entries());
  SpecialTokenFrame frame;
  for (const JsonField& entry : entries) {
    NESTOR_ASSIGN_OR_RETURN(const SpecialTokenFrame outer, ParsePostProcessor(entry));
    frame.before.insert(frame.before.begin(), outer.before.begin(), outer.before.end());
    frame.after.insert(frame.after.end(), outer.after.begin(), outer.after.end());
  }
  return frame;
}

}  // namespace

absl::StatusOr<SpecialTokenFrame> ParsePostProcessor(const JsonField& field) {
  if (field.is_null()) return SpecialTokenFrame();
  NESTOR_ASSIGN_OR_RETURN(const std::string type, field.GetString("type"));
  // Only moves offsets, which nobody here asks for.
  if (type == "ByteLevel") return SpecialTokenFrame();
  if (type == "Sequence") return ParseSequence(field);
  if (type == "TemplateProcessing") return ParseTemplate(field);
  if (type == "BertProcessing" || type == "RobertaProcessing") return ParseClassifierFrame(field);
  return field.Member("type").Error(absl::StrCat("post-processor \"", type, "\" is not supported"));
}

}  // namespace nestor
