#if defined(__x86_64__)
#include "target_avx512.h"
#include "sample_rows_impl.h"
#endif
