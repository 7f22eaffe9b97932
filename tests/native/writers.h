// Memory shared out to writers whose order of writes can be read back from any picture of it: writer w makes its n-th
// write to page `writers_page(w, n)`, first the word at the start, then the one at the end. In a picture of one instant
// every page holds its writer's last write to it up to some n, and only the write in flight may be half done.
#ifndef TM_WRITERS_H
#define TM_WRITERS_H
#include <stdint.h>
#include <string.h>

#define WRITERS_BASE 0x7ea000000000ul
#define WRITERS_PAGE 4096ul

enum { WRITERS = 2, WRITERS_PAGES = 2048, WRITERS_LAST = 511 }; // pages of each; index of a page's last word

static inline uint64_t writers_page(unsigned writer, uint64_t n) {
    uint64_t x = (n * WRITERS + writer + 1) * 0x9e3779b97f4a7c15u;
    return (x ^ x >> 31) % WRITERS_PAGES;
}

// Whether `pages` (WRITERS_PAGES of them) are such a picture; *upto is that n.
static inline const char *writers_check(unsigned writer, const uint64_t *pages, uint64_t *upto) {
    uint64_t last[WRITERS_PAGES], newest = 0;
    for (uint64_t page = 0; page < WRITERS_PAGES; page++) {
        uint64_t first = pages[page * 512];
        newest = first > newest ? first : newest;
    }
    memset(last, 0, sizeof last);
    for (uint64_t n = 1; n <= newest; n++) {
        last[writers_page(writer, n)] = n;
    }
    for (uint64_t page = 0; page < WRITERS_PAGES; page++) {
        uint64_t first = pages[page * 512], end = pages[page * 512 + WRITERS_LAST];
        if (first != last[page]) {
            return "a page is of another time than the rest";
        }
        if (end != first && first != newest) {
            return "a write that was over is half done";
        }
    }
    *upto = newest;
    return NULL;
}

#endif
