#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

// Returns the status of `expression` from the enclosing function unless it is OK.
#define NESTOR_RETURN_IF_ERROR(expression)         \
  do {                                             \
    absl::Status nestor_status = (expression);     \
    if (!nestor_status.ok()) return nestor_status; \
  } while (false)

#define NESTOR_STATUS_CONCAT_INNER(a, b) a##b
#define NESTOR_STATUS_CONCAT(a, b) NESTOR_STATUS_CONCAT_INNER(a, b)

// `NESTOR_ASSIGN_OR_RETURN(auto x, MakeX());` declares x, or returns the error.
#define NESTOR_ASSIGN_OR_RETURN(declaration, expression)                                       \
  NESTOR_ASSIGN_OR_RETURN_INNER(NESTOR_STATUS_CONCAT(nestor_statusor_, __LINE__), declaration, \
                                expression)
#define NESTOR_ASSIGN_OR_RETURN_INNER(statusor, declaration, expression) \
  auto statusor = (expression);                                          \
  if (!statusor.ok()) return statusor.status();                          \
  declaration = *std::move(statusor)
