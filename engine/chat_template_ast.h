#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "engine/chat_template_value.h"

namespace nestor::chat_template {

struct Expression;
using ExpressionPointer = std::unique_ptr<Expression>;

struct Expression {
  enum class Kind {
    kLiteral,      // literal
    kName,         // name
    kList,         // operands
    kDict,         // operands: key, value, key, value, ...
    kAttribute,    // operands[0].name
    kItem,         // operands[0][operands[1]]
    kSlice,        // operands[0][operands[1]:operands[2]:operands[3]]; null where left out
    kCall,         // operands[0](operands[1...], named)
    kFilter,       // operands[0] | name(operands[1...], named)
    kTest,         // operands[0] is name(operands[1...])
    kNot,          // not operands[0]
    kNegate,       // -operands[0]
    kAnd,          // operands[0] and operands[1]
    kOr,           // operands[0] or operands[1]
    kArithmetic,   // operands[0] name operands[1], name one of + - * // %
    kConcatenate,  // operands[0] ~ operands[1] ~ ...
    kCompare,  // operands[0] names[0] operands[1] names[1] operands[2] ..., as Python chains them
    kConditional,  // operands[1] if operands[0] else operands[2]; null where left out
  };
  Kind kind;
  int line;
  int depth = 1;  // of the tree below
  std::string name;
  std::vector<std::string> names;
  Value literal;
  std::vector<ExpressionPointer> operands;
  std::vector<std::pair<std::string, ExpressionPointer>> named;
};

struct Statement;
using Body = std::vector<Statement>;

struct Statement {
  enum class Kind {
    kText,      // text
    kOutput,    // {{ expression }}
    kIf,        // branches, the last without condition for else
    kFor,       // for targets in expression if condition: bodies[0], else bodies[1]
    kSet,       // targets = expression; or targets[0].attribute = expression
    kSetBlock,  // targets[0] = what bodies[0] prints
    kMacro,     // macro text(parameters): bodies[0]
    kBreak,
    kContinue,
  };
  struct Branch {
    ExpressionPointer condition;
    Body body;
  };
  struct Parameter {
    std::string name;
    ExpressionPointer default_value;  // may be null
  };
  Kind kind;
  int line;
  std::string text;
  std::vector<std::string> targets;
  std::string attribute;
  ExpressionPointer expression;
  ExpressionPointer condition;
  std::vector<Branch> branches;
  std::vector<Parameter> parameters;
  std::vector<Body> bodies;
};

}  // namespace nestor::chat_template
