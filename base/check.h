#pragma once

#include <cstdio>
#include <cstdlib>

// Aborts when one of our own invariants is broken. Never for input: that gets an absl::Status.
#define NESTOR_CHECK(condition)                                                          \
  do {                                                                                   \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: CHECK failed: %s\n", __FILE__, __LINE__, #condition); \
      std::abort();                                                                      \
    }                                                                                    \
  } while (false)
