#if defined(__x86_64__)
#include "target_avx2.h"
#include "rms_norm_impl.h"
#endif
