#include "engine/chat_template_renderer.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/chat_template_builtins.h"

namespace nestor::chat_template {
namespace {

constexpr size_t kMaxOutputBytes = size_t{64} << 20;
// Expressions and statements: about a second.
constexpr int64_t kMaxSteps = 5'000'000;
// Nested evaluations, through macros too.
constexpr int kMaxDepth = 256;

using Kind = Expression::Kind;

// One rendering of one template.
class Renderer {
 public:
  explicit Renderer(const Value::Dict& variables) : scopes_(1) {
    for (const auto& [name, value] : variables) scopes_[0].variables[name] = value;
  }

  absl::StatusOr<std::string> Render(const Body& body) {
    std::string out;
    out_ = &out;
    NESTOR_RETURN_IF_ERROR(Execute(body).status());
    return out;
  }

 private:
  enum class Flow { kNext, kBreak, kContinue };
  struct Scope {
    absl::flat_hash_map<std::string, Value> variables;
    absl::flat_hash_map<std::string, const Statement*> macros;
    // A macro's scope: the scopes below, but for the first, are its caller's and out of sight.
    bool is_macro = false;
  };

  // Counts nested evaluations for as long as it lives.
  class Nesting {
   public:
    explicit Nesting(int* depth) : depth_(depth) { ++*depth_; }
    ~Nesting() { --*depth_; }
    Nesting(const Nesting&) = delete;
    Nesting& operator=(const Nesting&) = delete;

   private:
    int* const depth_;
  };

  // `status` with the line, unless it carries one from further in.
  static absl::Status At(int line, const absl::Status& status) {
    constexpr char kPrefix[] = "chat template line ";
    if (status.ok() || status.message().substr(0, sizeof(kPrefix) - 1) == kPrefix) return status;
    return absl::Status(status.code(), absl::StrCat(kPrefix, line, ": ", status.message()));
  }

  absl::Status CountStep() {
    if (++num_steps_ > kMaxSteps) {
      return absl::ResourceExhaustedError(absl::StrCat("more than ", kMaxSteps, " steps"));
    }
    if (depth_ > kMaxDepth) {
      return absl::ResourceExhaustedError(absl::StrCat("nested deeper than ", kMaxDepth));
    }
    return absl::OkStatus();
  }

  absl::Status Print(const std::string& text) {
    num_printed_ += text.size();
    if (num_printed_ > kMaxOutputBytes) {
      return absl::ResourceExhaustedError(
          absl::StrCat("prints more than ", kMaxOutputBytes, " bytes"));
    }
    *out_ += text;
    return absl::OkStatus();
  }

  // Null where no scope in sight has `name`.
  Value* FindVariable(const std::string& name) {
    for (size_t i = scopes_.size(); i-- > 0;) {
      const auto found = scopes_[i].variables.find(name);
      if (found != scopes_[i].variables.end()) return &found->second;
      if (scopes_[i].is_macro) i = std::min<size_t>(i, 1);
    }
    return nullptr;
  }

  const Statement* FindMacro(const std::string& name) const {
    for (size_t i = scopes_.size(); i-- > 0;) {
      const auto found = scopes_[i].macros.find(name);
      if (found != scopes_[i].macros.end()) return found->second;
    }
    return nullptr;
  }

  absl::StatusOr<Flow> Execute(const Body& body) {
    const Nesting nesting(&depth_);
    for (const Statement& statement : body) {
      NESTOR_RETURN_IF_ERROR(At(statement.line, CountStep()));
      absl::StatusOr<Flow> flow = ExecuteStatement(statement);
      if (!flow.ok()) return At(statement.line, flow.status());
      if (*flow != Flow::kNext) return flow;
    }
    return Flow::kNext;
  }

  absl::StatusOr<Flow> ExecuteStatement(const Statement& statement) {
    switch (statement.kind) {
      case Statement::Kind::kText:
        NESTOR_RETURN_IF_ERROR(Print(statement.text));
        return Flow::kNext;
      case Statement::Kind::kOutput: {
        NESTOR_ASSIGN_OR_RETURN(const Value value, Evaluate(*statement.expression));
        NESTOR_ASSIGN_OR_RETURN(const std::string text, value.ToText());
        NESTOR_RETURN_IF_ERROR(Print(text));
        return Flow::kNext;
      }
      case Statement::Kind::kIf:
        return ExecuteIf(statement);
      case Statement::Kind::kFor:
        return ExecuteFor(statement);
      case Statement::Kind::kSet: {
        NESTOR_ASSIGN_OR_RETURN(Value value, Evaluate(*statement.expression));
        NESTOR_RETURN_IF_ERROR(Assign(statement, std::move(value)));
        return Flow::kNext;
      }
      case Statement::Kind::kSetBlock: {
        NESTOR_ASSIGN_OR_RETURN(std::string text, Capture(statement.bodies[0]));
        scopes_.back().variables[statement.targets[0]] = Value::String(std::move(text));
        return Flow::kNext;
      }
      case Statement::Kind::kMacro:
        scopes_.back().macros[statement.text] = &statement;
        return Flow::kNext;
      case Statement::Kind::kBreak:
        return Flow::kBreak;
      case Statement::Kind::kContinue:
        return Flow::kContinue;
    }
    return Flow::kNext;
  }

  absl::StatusOr<Flow> ExecuteIf(const Statement& statement) {
    for (const Statement::Branch& branch : statement.branches) {
      if (branch.condition == nullptr) return Execute(branch.body);
      NESTOR_ASSIGN_OR_RETURN(const Value condition, Evaluate(*branch.condition));
      if (condition.IsTrue()) return Execute(branch.body);
    }
    return Flow::kNext;
  }

  absl::StatusOr<Flow> ExecuteFor(const Statement& statement) {
    NESTOR_ASSIGN_OR_RETURN(const Value iterated, Evaluate(*statement.expression));
    NESTOR_ASSIGN_OR_RETURN(Value::List items, iterated.ToItems());
    if (statement.condition != nullptr) {
      NESTOR_ASSIGN_OR_RETURN(items, Filtered(statement, std::move(items)));
    }
    for (size_t i = 0; i < items.size(); ++i) {
      scopes_.emplace_back();
      absl::StatusOr<Flow> flow = ExecuteIteration(statement, items, i);
      scopes_.pop_back();
      NESTOR_RETURN_IF_ERROR(flow.status());
      if (*flow == Flow::kBreak) break;
    }
    if (items.empty() && statement.bodies.size() > 1) return Execute(statement.bodies[1]);
    return Flow::kNext;
  }

  absl::StatusOr<Flow> ExecuteIteration(const Statement& statement, const Value::List& items,
                                        size_t index) {
    NESTOR_RETURN_IF_ERROR(CountStep());
    NESTOR_RETURN_IF_ERROR(Unpack(statement.targets, items[index]));
    scopes_.back().variables["loop"] = LoopVariable(items, index);
    return Execute(statement.bodies[0]);
  }

  absl::StatusOr<Value::List> Filtered(const Statement& statement, Value::List items) {
    Value::List kept;
    for (Value& item : items) {
      scopes_.emplace_back();
      const absl::Status unpacked = Unpack(statement.targets, item);
      absl::StatusOr<Value> condition =
          unpacked.ok() ? Evaluate(*statement.condition) : absl::StatusOr<Value>(unpacked);
      scopes_.pop_back();
      NESTOR_RETURN_IF_ERROR(condition.status());
      if (condition->IsTrue()) kept.push_back(std::move(item));
    }
    return kept;
  }

  static Value LoopVariable(const Value::List& items, size_t index) {
    const int64_t i = static_cast<int64_t>(index);
    const int64_t size = static_cast<int64_t>(items.size());
    return Value::FromDict({
        {"index", Value::Int(i + 1)},
        {"index0", Value::Int(i)},
        {"first", Value::Bool(i == 0)},
        {"last", Value::Bool(i + 1 == size)},
        {"length", Value::Int(size)},
        {"revindex", Value::Int(size - i)},
        {"revindex0", Value::Int(size - i - 1)},
        {"previtem", i > 0 ? items[index - 1] : Value::Undefined("loop.previtem")},
        {"nextitem", i + 1 < size ? items[index + 1] : Value::Undefined("loop.nextitem")},
    });
  }

  // Assigns `value` to one target, or its items to several, in the innermost scope.
  absl::Status Unpack(const std::vector<std::string>& targets, const Value& value) {
    if (targets.size() == 1) {
      scopes_.back().variables[targets[0]] = value;
      return absl::OkStatus();
    }
    NESTOR_ASSIGN_OR_RETURN(const Value::List items, value.ToItems());
    if (items.size() != targets.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("cannot unpack ", items.size(), " values into ", targets.size()));
    }
    for (size_t i = 0; i < items.size(); ++i) scopes_.back().variables[targets[i]] = items[i];
    return absl::OkStatus();
  }

  absl::Status Assign(const Statement& statement, Value value) {
    if (statement.attribute.empty()) return Unpack(statement.targets, value);
    // Dictionaries are immutable: the namespace's variable gets another one.
    Value* space = FindVariable(statement.targets[0]);
    if (space == nullptr || !space->Is(Value::Kind::kDict)) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", statement.targets[0], "' is not a namespace"));
    }
    Value::Dict items = space->AsDict();
    for (auto& [name, item] : items) {
      if (name != statement.attribute) continue;
      item = std::move(value);
      *space = Value::FromDict(std::move(items));
      return absl::OkStatus();
    }
    items.emplace_back(statement.attribute, std::move(value));
    *space = Value::FromDict(std::move(items));
    return absl::OkStatus();
  }

  // What `body` prints.
  absl::StatusOr<std::string> Capture(const Body& body) {
    std::string captured;
    std::string* const outer = std::exchange(out_, &captured);
    const absl::Status status = Execute(body).status();
    out_ = outer;
    NESTOR_RETURN_IF_ERROR(status);
    return captured;
  }

  absl::StatusOr<Value> Evaluate(const Expression& expression) {
    const Nesting nesting(&depth_);
    NESTOR_RETURN_IF_ERROR(At(expression.line, CountStep()));
    absl::StatusOr<Value> value = EvaluateNode(expression);
    if (!value.ok()) return At(expression.line, value.status());
    return value;
  }

  absl::StatusOr<Value> EvaluateNode(const Expression& expression) {
    switch (expression.kind) {
      case Kind::kLiteral:
        return expression.literal;
      case Kind::kName: {
        const Value* value = FindVariable(expression.name);
        return value == nullptr ? Value::Undefined(expression.name) : *value;
      }
      case Kind::kList: {
        NESTOR_ASSIGN_OR_RETURN(Value::List items, EvaluateAll(expression, 0));
        return Value::FromList(std::move(items));
      }
      case Kind::kDict:
        return EvaluateDict(expression);
      case Kind::kAttribute: {
        NESTOR_ASSIGN_OR_RETURN(const Value object, Evaluate(*expression.operands[0]));
        return GetItem(object, Value::String(expression.name));
      }
      case Kind::kItem: {
        NESTOR_ASSIGN_OR_RETURN(const Value object, Evaluate(*expression.operands[0]));
        NESTOR_ASSIGN_OR_RETURN(const Value key, Evaluate(*expression.operands[1]));
        return GetItem(object, key);
      }
      case Kind::kSlice:
        return EvaluateSlice(expression);
      case Kind::kCall:
        return EvaluateCall(expression);
      case Kind::kFilter: {
        NESTOR_ASSIGN_OR_RETURN(const Value input, Evaluate(*expression.operands[0]));
        NESTOR_ASSIGN_OR_RETURN(const Arguments arguments, EvaluateArguments(expression));
        return ApplyFilter(expression.name, input, arguments);
      }
      case Kind::kConcatenate:
        return EvaluateConcatenation(expression);
      case Kind::kArithmetic: {
        NESTOR_ASSIGN_OR_RETURN(const Value left, Evaluate(*expression.operands[0]));
        NESTOR_ASSIGN_OR_RETURN(const Value right, Evaluate(*expression.operands[1]));
        return Arithmetic(expression.name, left, right);
      }
      case Kind::kNegate: {
        NESTOR_ASSIGN_OR_RETURN(const Value operand, Evaluate(*expression.operands[0]));
        return Arithmetic("-", Value::Int(0), operand);
      }
      default:
        return EvaluateLogic(expression);
    }
  }

  absl::StatusOr<Value> EvaluateLogic(const Expression& expression) {
    if (expression.kind == Kind::kCompare) return EvaluateCompare(expression);
    NESTOR_ASSIGN_OR_RETURN(const Value first, Evaluate(*expression.operands[0]));
    switch (expression.kind) {
      case Kind::kNot:
        return Value::Bool(!first.IsTrue());
      case Kind::kAnd:
        return first.IsTrue() ? Evaluate(*expression.operands[1]) : first;
      case Kind::kOr:
        return first.IsTrue() ? first : Evaluate(*expression.operands[1]);
      case Kind::kTest: {
        NESTOR_ASSIGN_OR_RETURN(const Arguments arguments, EvaluateArguments(expression));
        NESTOR_ASSIGN_OR_RETURN(const bool passes, ApplyTest(expression.name, first, arguments));
        return Value::Bool(passes);
      }
      default:  // kConditional
        if (first.IsTrue()) return Evaluate(*expression.operands[1]);
        if (expression.operands[2] != nullptr) return Evaluate(*expression.operands[2]);
        return Value::Undefined("the conditional without else");
    }
  }

  // "a < b < c" is "a < b and b < c".
  absl::StatusOr<Value> EvaluateCompare(const Expression& expression) {
    NESTOR_ASSIGN_OR_RETURN(Value left, Evaluate(*expression.operands[0]));
    for (size_t i = 0; i < expression.names.size(); ++i) {
      NESTOR_ASSIGN_OR_RETURN(Value right, Evaluate(*expression.operands[i + 1]));
      NESTOR_ASSIGN_OR_RETURN(const bool holds, Compare(expression.names[i], left, right));
      if (!holds) return Value::Bool(false);
      left = std::move(right);
    }
    return Value::Bool(true);
  }

  absl::StatusOr<Value> EvaluateConcatenation(const Expression& expression) {
    std::string text;
    for (const ExpressionPointer& operand : expression.operands) {
      NESTOR_ASSIGN_OR_RETURN(const Value value, Evaluate(*operand));
      NESTOR_ASSIGN_OR_RETURN(const std::string part, value.ToText());
      text += part;
      if (text.size() > kMaxValueSize) {
        return absl::ResourceExhaustedError("'~' makes too long a string");
      }
    }
    return Value::String(std::move(text));
  }

  absl::StatusOr<Value> EvaluateSlice(const Expression& expression) {
    NESTOR_ASSIGN_OR_RETURN(const Value object, Evaluate(*expression.operands[0]));
    Value bounds[3] = {Value::None(), Value::None(), Value::None()};
    for (size_t i = 0; i < 3; ++i) {
      if (expression.operands[i + 1] == nullptr) continue;
      NESTOR_ASSIGN_OR_RETURN(bounds[i], Evaluate(*expression.operands[i + 1]));
    }
    return GetSlice(object, bounds[0], bounds[1], bounds[2]);
  }

  absl::StatusOr<Value> EvaluateDict(const Expression& expression) {
    Value::Dict items;
    for (size_t i = 0; i < expression.operands.size(); i += 2) {
      NESTOR_ASSIGN_OR_RETURN(const Value key, Evaluate(*expression.operands[i]));
      NESTOR_ASSIGN_OR_RETURN(Value value, Evaluate(*expression.operands[i + 1]));
      if (!key.Is(Value::Kind::kString)) {
        return absl::InvalidArgumentError("a dictionary's key must be a string");
      }
      items.emplace_back(key.AsString(), std::move(value));
    }
    return Value::FromDict(std::move(items));
  }

  absl::StatusOr<Value::List> EvaluateAll(const Expression& expression, size_t first) {
    Value::List values;
    for (size_t i = first; i < expression.operands.size(); ++i) {
      NESTOR_ASSIGN_OR_RETURN(Value value, Evaluate(*expression.operands[i]));
      values.push_back(std::move(value));
    }
    return values;
  }

  absl::StatusOr<Arguments> EvaluateArguments(const Expression& expression) {
    Arguments arguments;
    NESTOR_ASSIGN_OR_RETURN(arguments.positional, EvaluateAll(expression, 1));
    for (const auto& [name, operand] : expression.named) {
      NESTOR_ASSIGN_OR_RETURN(Value value, Evaluate(*operand));
      arguments.named.emplace_back(name, std::move(value));
    }
    return arguments;
  }

  absl::StatusOr<Value> EvaluateCall(const Expression& expression) {
    const Expression& callee = *expression.operands[0];
    NESTOR_ASSIGN_OR_RETURN(const Arguments arguments, EvaluateArguments(expression));
    if (callee.kind == Kind::kAttribute) {
      NESTOR_ASSIGN_OR_RETURN(const Value object, Evaluate(*callee.operands[0]));
      return CallMethod(object, callee.name, arguments);
    }
    if (callee.kind != Kind::kName) {
      return absl::InvalidArgumentError("only functions, macros and methods can be called");
    }
    const Statement* macro = FindMacro(callee.name);
    if (macro != nullptr) return CallMacro(*macro, arguments);
    return CallGlobal(callee.name, arguments);
  }

  absl::StatusOr<Value> CallMacro(const Statement& macro, const Arguments& arguments) {
    if (arguments.positional.size() > macro.parameters.size()) {
      return absl::InvalidArgumentError(absl::StrCat("macro '", macro.text, "' takes ",
                                                     macro.parameters.size(), " arguments; had ",
                                                     arguments.positional.size()));
    }
    scopes_.emplace_back().is_macro = true;
    const absl::Status bound = BindParameters(macro, arguments);
    absl::StatusOr<std::string> text =
        bound.ok() ? Capture(macro.bodies[0]) : absl::StatusOr<std::string>(bound);
    scopes_.pop_back();
    NESTOR_RETURN_IF_ERROR(text.status());
    return Value::String(*std::move(text));
  }

  absl::Status BindParameters(const Statement& macro, const Arguments& arguments) {
    for (size_t i = 0; i < macro.parameters.size(); ++i) {
      const Statement::Parameter& parameter = macro.parameters[i];
      const Value* argument = arguments.Find(i, parameter.name);
      Value value = argument != nullptr ? *argument : Value::Undefined(parameter.name);
      if (argument == nullptr && parameter.default_value != nullptr) {
        NESTOR_ASSIGN_OR_RETURN(value, Evaluate(*parameter.default_value));
      }
      scopes_.back().variables[parameter.name] = std::move(value);
    }
    return absl::OkStatus();
  }

  std::vector<Scope> scopes_;  // the first is the template's own
  std::string* out_ = nullptr;
  size_t num_printed_ = 0;
  int64_t num_steps_ = 0;
  int depth_ = 0;
};

}  // namespace

absl::StatusOr<std::string> RenderTemplate(const Body& body, const Value::Dict& variables) {
  return Renderer(variables).Render(body);
}

}  // namespace nestor::chat_template
