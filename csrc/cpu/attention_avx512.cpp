#if defined(__x86_64__)
#include "target_avx512.h"
#include "attention_impl.h"
#endif
