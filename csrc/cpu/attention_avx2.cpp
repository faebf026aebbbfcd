#if defined(__x86_64__)
#include "target_avx2.h"
#include "attention_impl.h"
#endif
