#if defined(__x86_64__)
#include "target_avx512.h"
#include "rms_norm_impl.h"
#endif
