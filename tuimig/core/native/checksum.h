// Internal: the parts of a page's sum (spool.h has the whole).
#ifndef TM_CHECKSUM_H
#define TM_CHECKSUM_H
#include <stdint.h>

enum tm_sum {
    TM_SUM_HOLE = 0, // an all-zero page; nothing is stored
    TM_SUM_ZERO = 1, // an all-zero page that replaces other content (a changed page of a private file mapping)
};

uint32_t tm_crc32c_page(const void *page); // plain CRC32C of 4096 bytes
int tm_page_is_zero(const void *page);

#endif
