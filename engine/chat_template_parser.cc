#include "engine/chat_template_parser.h"

#include <algorithm>
#include <initializer_list>
#include <string_view>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "engine/chat_template_lexer.h"

namespace nestor::chat_template {
namespace {

// No published template comes near.
constexpr int kMaxNesting = 64;
constexpr int kMaxExpressionDepth = 128;

using Kind = Expression::Kind;

// Recursive descent; methods from the loosest to the tightest binding, as in Jinja.
class Parser {
 public:
  explicit Parser(std::vector<Token> tokens) : tokens_(std::move(tokens)) {}

  absl::StatusOr<Body> Run() {
    NESTOR_ASSIGN_OR_RETURN(Body body, ParseBody({}));
    if (Current().kind != Token::Kind::kEnd) return Unexpected();
    return body;
  }

 private:
  // Counts nested constructs for as long as it lives.
  class Nesting {
   public:
    explicit Nesting(int* depth) : depth_(depth) { ++*depth_; }
    ~Nesting() { --*depth_; }
    Nesting(const Nesting&) = delete;
    Nesting& operator=(const Nesting&) = delete;

   private:
    int* const depth_;
  };

  const Token& Current() const { return tokens_[position_]; }
  const Token& Following() const { return tokens_[std::min(position_ + 1, tokens_.size() - 1)]; }
  Token Take() {
    Token token = tokens_[position_];
    if (position_ + 1 < tokens_.size()) ++position_;
    return token;
  }
  bool Is(Token::Kind kind, std::string_view text) const {
    return Current().kind == kind && Current().text == text;
  }
  bool IsOperator(std::string_view text) const { return Is(Token::Kind::kOperator, text); }
  bool IsName(std::string_view text) const { return Is(Token::Kind::kName, text); }
  bool TakeOperator(std::string_view text) {
    const bool is_here = IsOperator(text);
    if (is_here) Take();
    return is_here;
  }
  bool TakeName(std::string_view text) {
    const bool is_here = IsName(text);
    if (is_here) Take();
    return is_here;
  }

  absl::Status Error(int line, const std::string& message) const {
    return absl::InvalidArgumentError(absl::StrCat("chat template line ", line, ": ", message));
  }
  absl::Status Unexpected() const {
    const Token& token = Current();
    switch (token.kind) {
      case Token::Kind::kEnd:
        return Error(token.line, "unexpected end of the template");
      case Token::Kind::kTagEnd:
      case Token::Kind::kOutputEnd:
        return Error(token.line, "unexpected end of the tag");
      default:
        return Error(token.line, absl::StrCat("unexpected '", token.text, "'"));
    }
  }
  absl::Status Expect(Token::Kind kind) {
    if (Current().kind != kind) return Unexpected();
    Take();
    return absl::OkStatus();
  }
  absl::Status ExpectOperator(std::string_view text) {
    return TakeOperator(text) ? absl::OkStatus() : Unexpected();
  }
  absl::StatusOr<std::string> ExpectName() {
    if (Current().kind != Token::Kind::kName) return Unexpected();
    return Take().text;
  }

  bool IsTagNamed(const std::vector<std::string_view>& names) const {
    return Current().kind == Token::Kind::kTagBegin &&
           std::find(names.begin(), names.end(), Following().text) != names.end();
  }

  // Up to a tag of one of `ends`, which stays.
  absl::StatusOr<Body> ParseBody(const std::vector<std::string_view>& ends) {
    const Nesting nesting(&nesting_);
    if (nesting_ > kMaxNesting) return Error(Current().line, "nested too deeply");
    Body body;
    while (Current().kind != Token::Kind::kEnd && !IsTagNamed(ends)) {
      if (Current().kind == Token::Kind::kText) {
        Statement& text = body.emplace_back(NewStatement(Statement::Kind::kText));
        text.text = Take().text;
      } else if (Current().kind == Token::Kind::kOutputBegin) {
        NESTOR_ASSIGN_OR_RETURN(Statement output, ParseOutput());
        body.push_back(std::move(output));
      } else {
        NESTOR_RETURN_IF_ERROR(ParseTag(&body));
      }
    }
    return body;
  }

  // Takes "{% NAME %}".
  absl::Status ExpectTag(std::string_view name) {
    NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kTagBegin));
    if (!TakeName(name)) return Unexpected();
    return Expect(Token::Kind::kTagEnd);
  }

  Statement NewStatement(Statement::Kind kind) const {
    Statement statement;
    statement.kind = kind;
    statement.line = Current().line;
    return statement;
  }

  absl::StatusOr<Statement> ParseOutput() {
    Statement output = NewStatement(Statement::Kind::kOutput);
    Take();
    NESTOR_ASSIGN_OR_RETURN(output.expression, ParseExpression());
    NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kOutputEnd));
    return output;
  }

  absl::Status ParseTag(Body* body) {
    NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kTagBegin));
    const int line = Current().line;
    NESTOR_ASSIGN_OR_RETURN(const std::string name, ExpectName());
    if (name == "generation") return ParseGeneration(body);
    absl::StatusOr<Statement> statement =
        Error(line, absl::StrCat("{% ", name, " %}",
                                 name.starts_with("end") || name.starts_with("el")
                                     ? " has no beginning"
                                     : " is not supported"));
    if (name == "if") statement = ParseIf();
    if (name == "for") statement = ParseFor();
    if (name == "set") statement = ParseSet();
    if (name == "macro") statement = ParseMacro();
    if (name == "break") statement = ParseLoopControl(Statement::Kind::kBreak);
    if (name == "continue") statement = ParseLoopControl(Statement::Kind::kContinue);
    if (!statement.ok()) return statement.status();
    body->push_back(*std::move(statement));
    return absl::OkStatus();
  }

  // transformers' mark round the assistant's words, which prints them as they are.
  absl::Status ParseGeneration(Body* body) {
    NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kTagEnd));
    NESTOR_ASSIGN_OR_RETURN(Body marked, ParseBody({"endgeneration"}));
    NESTOR_RETURN_IF_ERROR(ExpectTag("endgeneration"));
    std::move(marked.begin(), marked.end(), std::back_inserter(*body));
    return absl::OkStatus();
  }

  absl::StatusOr<Statement> ParseIf() {
    Statement statement = NewStatement(Statement::Kind::kIf);
    bool has_condition = true;
    while (true) {
      Statement::Branch& branch = statement.branches.emplace_back();
      if (has_condition) {
        NESTOR_ASSIGN_OR_RETURN(branch.condition, ParseExpression());
      }
      NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kTagEnd));
      std::vector<std::string_view> ends = {"endif"};
      if (has_condition) ends.insert(ends.end(), {"elif", "else"});
      NESTOR_ASSIGN_OR_RETURN(branch.body, ParseBody(ends));
      if (Following().text == "endif" || Current().kind == Token::Kind::kEnd) break;
      Take();
      has_condition = Take().text == "elif";
    }
    NESTOR_RETURN_IF_ERROR(ExpectTag("endif"));
    return statement;
  }

  absl::StatusOr<Statement> ParseFor() {
    Statement statement = NewStatement(Statement::Kind::kFor);
    NESTOR_RETURN_IF_ERROR(ParseTargets(&statement.targets));
    if (!TakeName("in")) return Unexpected();
    NESTOR_ASSIGN_OR_RETURN(statement.expression, ParseOr());
    if (TakeName("if")) {
      NESTOR_ASSIGN_OR_RETURN(statement.condition, ParseExpression());
    }
    if (IsName("recursive")) return Error(Current().line, "recursive loops are not supported");
    NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kTagEnd));
    ++num_open_loops_;
    NESTOR_ASSIGN_OR_RETURN(Body body, ParseBody({"endfor", "else"}));
    --num_open_loops_;
    statement.bodies.push_back(std::move(body));
    if (Following().text == "else") {
      NESTOR_RETURN_IF_ERROR(ExpectTag("else"));
      NESTOR_ASSIGN_OR_RETURN(Body otherwise, ParseBody({"endfor"}));
      statement.bodies.push_back(std::move(otherwise));
    }
    NESTOR_RETURN_IF_ERROR(ExpectTag("endfor"));
    return statement;
  }

  absl::Status ParseTargets(std::vector<std::string>* targets) {
    const bool is_in_parentheses = TakeOperator("(");
    do {
      NESTOR_ASSIGN_OR_RETURN(std::string target, ExpectName());
      targets->push_back(std::move(target));
    } while (TakeOperator(","));
    return is_in_parentheses ? ExpectOperator(")") : absl::OkStatus();
  }

  absl::StatusOr<Statement> ParseSet() {
    Statement statement = NewStatement(Statement::Kind::kSet);
    NESTOR_RETURN_IF_ERROR(ParseTargets(&statement.targets));
    if (statement.targets.size() == 1 && TakeOperator(".")) {
      NESTOR_ASSIGN_OR_RETURN(statement.attribute, ExpectName());
    }
    if (TakeOperator("=")) {
      NESTOR_ASSIGN_OR_RETURN(statement.expression, ParseTuple());
      NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kTagEnd));
      return statement;
    }
    statement.kind = Statement::Kind::kSetBlock;
    if (statement.targets.size() != 1) return Unexpected();
    NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kTagEnd));
    NESTOR_ASSIGN_OR_RETURN(Body body, ParseBody({"endset"}));
    statement.bodies.push_back(std::move(body));
    NESTOR_RETURN_IF_ERROR(ExpectTag("endset"));
    return statement;
  }

  absl::StatusOr<Statement> ParseMacro() {
    Statement statement = NewStatement(Statement::Kind::kMacro);
    NESTOR_ASSIGN_OR_RETURN(statement.text, ExpectName());
    NESTOR_RETURN_IF_ERROR(ExpectOperator("("));
    while (!IsOperator(")")) {
      Statement::Parameter& parameter = statement.parameters.emplace_back();
      NESTOR_ASSIGN_OR_RETURN(parameter.name, ExpectName());
      if (TakeOperator("=")) {
        NESTOR_ASSIGN_OR_RETURN(parameter.default_value, ParseExpression());
      }
      if (!TakeOperator(",")) break;
    }
    NESTOR_RETURN_IF_ERROR(ExpectOperator(")"));
    NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kTagEnd));
    const int num_open_loops = std::exchange(num_open_loops_, 0);
    NESTOR_ASSIGN_OR_RETURN(Body body, ParseBody({"endmacro"}));
    num_open_loops_ = num_open_loops;
    statement.bodies.push_back(std::move(body));
    NESTOR_RETURN_IF_ERROR(ExpectTag("endmacro"));
    return statement;
  }

  absl::StatusOr<Statement> ParseLoopControl(Statement::Kind kind) {
    if (num_open_loops_ == 0) return Error(Current().line, "outside of a loop");
    Statement statement = NewStatement(kind);
    NESTOR_RETURN_IF_ERROR(Expect(Token::Kind::kTagEnd));
    return statement;
  }

  ExpressionPointer NewExpression(Kind kind, std::string name = "") const {
    auto expression = std::make_unique<Expression>();
    expression->kind = kind;
    expression->line = Current().line;
    expression->name = std::move(name);
    return expression;
  }

  template <typename... Operands>
  ExpressionPointer NewExpression(Kind kind, std::string name, Operands... operands) const {
    ExpressionPointer expression = NewExpression(kind, std::move(name));
    (expression->operands.push_back(std::move(operands)), ...);
    return expression;
  }

  // Sets the depth, and refuses a tree that evaluation could not walk.
  absl::StatusOr<ExpressionPointer> Checked(ExpressionPointer expression) const {
    const auto deepen = [&expression](const ExpressionPointer& operand) {
      if (operand != nullptr) expression->depth = std::max(expression->depth, operand->depth + 1);
    };
    for (const ExpressionPointer& operand : expression->operands) deepen(operand);
    for (const auto& [name, operand] : expression->named) deepen(operand);
    if (expression->depth > kMaxExpressionDepth) {
      return Error(expression->line, "the expression is nested too deeply");
    }
    return expression;
  }

  // "a, b" without parentheses, as set allows.
  absl::StatusOr<ExpressionPointer> ParseTuple() {
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer first, ParseExpression());
    if (!IsOperator(",")) return first;
    ExpressionPointer tuple = NewExpression(Kind::kList, "", std::move(first));
    while (TakeOperator(",")) {
      if (Current().kind == Token::Kind::kTagEnd) break;
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer item, ParseExpression());
      tuple->operands.push_back(std::move(item));
    }
    return Checked(std::move(tuple));
  }

  absl::StatusOr<ExpressionPointer> ParseExpression() {
    const Nesting nesting(&nesting_);
    if (nesting_ > kMaxNesting) return Error(Current().line, "nested too deeply");
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer expression, ParseOr());
    while (TakeName("if")) {
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer condition, ParseOr());
      ExpressionPointer otherwise;
      if (TakeName("else")) {
        NESTOR_ASSIGN_OR_RETURN(otherwise, ParseExpression());
      }
      NESTOR_ASSIGN_OR_RETURN(expression,
                              Checked(NewExpression(Kind::kConditional, "", std::move(condition),
                                                    std::move(expression), std::move(otherwise))));
    }
    return expression;
  }

  absl::StatusOr<ExpressionPointer> ParseOr() {
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer left, ParseAnd());
    while (TakeName("or")) {
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer right, ParseAnd());
      NESTOR_ASSIGN_OR_RETURN(
          left, Checked(NewExpression(Kind::kOr, "", std::move(left), std::move(right))));
    }
    return left;
  }

  absl::StatusOr<ExpressionPointer> ParseAnd() {
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer left, ParseNot());
    while (TakeName("and")) {
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer right, ParseNot());
      NESTOR_ASSIGN_OR_RETURN(
          left, Checked(NewExpression(Kind::kAnd, "", std::move(left), std::move(right))));
    }
    return left;
  }

  absl::StatusOr<ExpressionPointer> ParseNot() {
    if (!TakeName("not")) return ParseCompare();
    const Nesting nesting(&nesting_);
    if (nesting_ > kMaxNesting) return Error(Current().line, "nested too deeply");
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer operand, ParseNot());
    return Checked(NewExpression(Kind::kNot, "", std::move(operand)));
  }

  // Takes a comparison's operator; "" where there is none.
  std::string TakeComparison() {
    for (const char* op : {"==", "!=", "<=", ">=", "<", ">"}) {
      if (TakeOperator(op)) return op;
    }
    if (TakeName("in")) return "in";
    if (IsName("not") && Following().kind == Token::Kind::kName && Following().text == "in") {
      Take();
      Take();
      return "not in";
    }
    return "";
  }

  absl::StatusOr<ExpressionPointer> ParseCompare() {
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer left, ParseSum());
    std::string op = TakeComparison();
    if (op.empty()) return left;
    ExpressionPointer compare = NewExpression(Kind::kCompare, "", std::move(left));
    for (; !op.empty(); op = TakeComparison()) {
      compare->names.push_back(op);
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer right, ParseSum());
      compare->operands.push_back(std::move(right));
    }
    return Checked(std::move(compare));
  }

  absl::StatusOr<ExpressionPointer> ParseSum() {
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer left, ParseConcatenation());
    while (IsOperator("+") || IsOperator("-")) {
      const std::string op = Take().text;
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer right, ParseConcatenation());
      NESTOR_ASSIGN_OR_RETURN(
          left, Checked(NewExpression(Kind::kArithmetic, op, std::move(left), std::move(right))));
    }
    return left;
  }

  absl::StatusOr<ExpressionPointer> ParseConcatenation() {
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer first, ParseProduct());
    if (!IsOperator("~")) return first;
    ExpressionPointer concatenation = NewExpression(Kind::kConcatenate, "", std::move(first));
    while (TakeOperator("~")) {
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer next, ParseProduct());
      concatenation->operands.push_back(std::move(next));
    }
    return Checked(std::move(concatenation));
  }

  absl::StatusOr<ExpressionPointer> ParseProduct() {
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer left, ParseUnary());
    while (IsOperator("*") || IsOperator("//") || IsOperator("%")) {
      const std::string op = Take().text;
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer right, ParseUnary());
      NESTOR_ASSIGN_OR_RETURN(
          left, Checked(NewExpression(Kind::kArithmetic, op, std::move(left), std::move(right))));
    }
    if (IsOperator("/") || IsOperator("**")) {
      return Error(Current().line,
                   absl::StrCat("operator '", Current().text, "' is not supported"));
    }
    return left;
  }

  absl::StatusOr<ExpressionPointer> ParseUnary() {
    ExpressionPointer operand;
    const bool is_negated = TakeOperator("-");
    if (!is_negated) TakeOperator("+");
    NESTOR_ASSIGN_OR_RETURN(operand, ParsePrimary());
    NESTOR_ASSIGN_OR_RETURN(operand, ParsePostfix(std::move(operand)));
    if (is_negated) operand = NewExpression(Kind::kNegate, "", std::move(operand));
    return ParseFilters(std::move(operand));
  }

  absl::StatusOr<ExpressionPointer> ParsePrimary() {
    switch (Current().kind) {
      case Token::Kind::kName:
        return ParseName();
      case Token::Kind::kString: {
        ExpressionPointer literal = NewExpression(Kind::kLiteral);
        std::string text;
        // Neighbours are one string, as in Python.
        while (Current().kind == Token::Kind::kString) text += Take().text;
        literal->literal = Value::String(std::move(text));
        return literal;
      }
      case Token::Kind::kInteger: {
        ExpressionPointer literal = NewExpression(Kind::kLiteral);
        int64_t value = 0;
        if (!absl::SimpleAtoi(Current().text, &value)) {
          return Error(Current().line, absl::StrCat(Current().text, " is too large"));
        }
        Take();
        literal->literal = Value::Int(value);
        return literal;
      }
      default:
        break;
    }
    if (TakeOperator("(")) return ParseParenthesized();
    if (TakeOperator("[")) return ParseListAfterBracket();
    if (TakeOperator("{")) return ParseDictAfterBrace();
    return Unexpected();
  }

  absl::StatusOr<ExpressionPointer> ParseName() {
    ExpressionPointer name = NewExpression(Kind::kName, Current().text);
    Take();
    const std::string& text = name->name;
    if (text == "true" || text == "True" || text == "false" || text == "False") {
      name->kind = Kind::kLiteral;
      name->literal = Value::Bool(text == "true" || text == "True");
    } else if (text == "none" || text == "None") {
      name->kind = Kind::kLiteral;
      name->literal = Value::None();
    }
    return name;
  }

  // Items up to `closing`, which is taken.
  absl::Status ParseItems(std::string_view closing, std::vector<ExpressionPointer>* items) {
    while (!IsOperator(closing)) {
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer item, ParseExpression());
      items->push_back(std::move(item));
      if (!TakeOperator(",")) break;
    }
    return ExpectOperator(closing);
  }

  // "(a)" is a, "(a, b)" and "()" are tuples, which behave as lists.
  absl::StatusOr<ExpressionPointer> ParseParenthesized() {
    ExpressionPointer tuple = NewExpression(Kind::kList);
    if (TakeOperator(")")) return tuple;
    NESTOR_ASSIGN_OR_RETURN(ExpressionPointer first, ParseExpression());
    if (TakeOperator(")")) return first;
    tuple->operands.push_back(std::move(first));
    NESTOR_RETURN_IF_ERROR(ExpectOperator(","));
    NESTOR_RETURN_IF_ERROR(ParseItems(")", &tuple->operands));
    return Checked(std::move(tuple));
  }

  absl::StatusOr<ExpressionPointer> ParseListAfterBracket() {
    ExpressionPointer list = NewExpression(Kind::kList);
    NESTOR_RETURN_IF_ERROR(ParseItems("]", &list->operands));
    return Checked(std::move(list));
  }

  absl::StatusOr<ExpressionPointer> ParseDictAfterBrace() {
    ExpressionPointer dict = NewExpression(Kind::kDict);
    while (!IsOperator("}")) {
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer key, ParseExpression());
      NESTOR_RETURN_IF_ERROR(ExpectOperator(":"));
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer value, ParseExpression());
      dict->operands.push_back(std::move(key));
      dict->operands.push_back(std::move(value));
      if (!TakeOperator(",")) break;
    }
    NESTOR_RETURN_IF_ERROR(ExpectOperator("}"));
    return Checked(std::move(dict));
  }

  absl::StatusOr<ExpressionPointer> ParsePostfix(ExpressionPointer operand) {
    while (true) {
      if (TakeOperator(".")) {
        if (Current().kind == Token::Kind::kInteger) {
          NESTOR_ASSIGN_OR_RETURN(ExpressionPointer index, ParsePrimary());
          operand = NewExpression(Kind::kItem, "", std::move(operand), std::move(index));
        } else {
          NESTOR_ASSIGN_OR_RETURN(const std::string name, ExpectName());
          operand = NewExpression(Kind::kAttribute, name, std::move(operand));
        }
      } else if (TakeOperator("[")) {
        NESTOR_ASSIGN_OR_RETURN(operand, ParseSubscript(std::move(operand)));
      } else if (IsOperator("(")) {
        operand = NewExpression(Kind::kCall, "", std::move(operand));
        NESTOR_RETURN_IF_ERROR(ParseArguments(operand.get()));
      } else {
        return operand;
      }
      NESTOR_ASSIGN_OR_RETURN(operand, Checked(std::move(operand)));
    }
  }

  // After "[": an index or a slice.
  absl::StatusOr<ExpressionPointer> ParseSubscript(ExpressionPointer operand) {
    std::vector<ExpressionPointer> parts(1);
    if (!IsOperator(":")) {
      NESTOR_ASSIGN_OR_RETURN(parts[0], ParseExpression());
    }
    while (parts.size() < 3 && TakeOperator(":")) {
      ExpressionPointer& part = parts.emplace_back();
      if (!IsOperator(":") && !IsOperator("]")) {
        NESTOR_ASSIGN_OR_RETURN(part, ParseExpression());
      }
    }
    NESTOR_RETURN_IF_ERROR(ExpectOperator("]"));
    if (parts.size() == 1) {
      return NewExpression(Kind::kItem, "", std::move(operand), std::move(parts[0]));
    }
    parts.resize(3);
    return NewExpression(Kind::kSlice, "", std::move(operand), std::move(parts[0]),
                         std::move(parts[1]), std::move(parts[2]));
  }

  // "(a, b, name=c)", appended to `call`.
  absl::Status ParseArguments(Expression* call) {
    NESTOR_RETURN_IF_ERROR(ExpectOperator("("));
    while (!IsOperator(")")) {
      const bool is_named = Current().kind == Token::Kind::kName &&
                            Following().kind == Token::Kind::kOperator && Following().text == "=";
      std::string name;
      if (is_named) {
        name = Take().text;
        Take();
      }
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer value, ParseExpression());
      if (is_named) {
        call->named.emplace_back(std::move(name), std::move(value));
      } else if (call->named.empty()) {
        call->operands.push_back(std::move(value));
      } else {
        return Error(Current().line, "a positional argument follows a named one");
      }
      if (!TakeOperator(",")) break;
    }
    return ExpectOperator(")");
  }

  absl::StatusOr<ExpressionPointer> ParseFilters(ExpressionPointer operand) {
    while (true) {
      if (TakeOperator("|")) {
        NESTOR_ASSIGN_OR_RETURN(const std::string name, ExpectName());
        operand = NewExpression(Kind::kFilter, name, std::move(operand));
        if (IsOperator("(")) NESTOR_RETURN_IF_ERROR(ParseArguments(operand.get()));
      } else if (TakeName("is")) {
        NESTOR_ASSIGN_OR_RETURN(operand, ParseTest(std::move(operand)));
      } else {
        return Checked(std::move(operand));
      }
      NESTOR_ASSIGN_OR_RETURN(operand, Checked(std::move(operand)));
    }
  }

  // After "is".
  absl::StatusOr<ExpressionPointer> ParseTest(ExpressionPointer operand) {
    const bool is_negated = TakeName("not");
    NESTOR_ASSIGN_OR_RETURN(const std::string name, ExpectName());
    ExpressionPointer test = NewExpression(Kind::kTest, name, std::move(operand));
    if (IsOperator("(")) {
      NESTOR_RETURN_IF_ERROR(ParseArguments(test.get()));
    } else if (StartsTestArgument()) {
      NESTOR_ASSIGN_OR_RETURN(ExpressionPointer argument, ParsePrimary());
      NESTOR_ASSIGN_OR_RETURN(argument, ParsePostfix(std::move(argument)));
      test->operands.push_back(std::move(argument));
    }
    if (is_negated) return NewExpression(Kind::kNot, "", std::move(test));
    return test;
  }

  // "is divisibleby 3": an argument without parentheses.
  bool StartsTestArgument() const {
    const Token& token = Current();
    if (token.kind == Token::Kind::kString || token.kind == Token::Kind::kInteger) return true;
    if (token.kind == Token::Kind::kOperator) return token.text == "[" || token.text == "{";
    if (token.kind != Token::Kind::kName) return false;
    for (const char* keyword : {"else", "or", "and", "is", "if", "in", "not"}) {
      if (token.text == keyword) return false;
    }
    return true;
  }

  const std::vector<Token> tokens_;
  size_t position_ = 0;
  int nesting_ = 0;
  int num_open_loops_ = 0;
};

}  // namespace

absl::StatusOr<Body> ParseTemplate(const std::string& source) {
  NESTOR_ASSIGN_OR_RETURN(std::vector<Token> tokens, Tokenize(source));
  return Parser(std::move(tokens)).Run();
}

}  // namespace nestor::chat_template
