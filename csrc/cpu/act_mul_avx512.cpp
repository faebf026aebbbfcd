#if defined(__x86_64__)
#include "target_avx512.h"
#include "act_mul_impl.h"
#endif
