#if defined(__x86_64__)
// clang-format off: what sets the target comes first
#include "target_avx512.h"
#include "sample_rows_impl.h"
// clang-format on
#endif
