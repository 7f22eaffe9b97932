// A process whose memory is filled lazily, as a restored copy's is: a child with regions at fixed addresses, its
// userfaultfd in our hands, and a spool with known content. The child runs a function once the filler has started.
#ifndef TM_LAZY_H
#define TM_LAZY_H
#include "fill.h"
#include "spool.h"

#define PAGE 4096ul
#define BASE ((char *)0x7ea000000000) // the first region; spool page 0. An address that sanitizers leave to programs

struct lazy {
    pid_t pid;
    int pidfd;
    int uffd;
    int pages_fd;
    int go[2]; // pipe that lets the child run
    struct tm_spool *spool;
    struct tm_fill *fill;
    uint64_t n_pages;
};

typedef void lazy_body(uint64_t n_pages);

uint64_t lazy_word(uint64_t page, uint64_t word); // what is stored; every seventh page is zero
int lazy_page_is(const char *at, uint64_t page);  // holds what is stored
int lazy_page_is_zero(const char *at);

// Child and spool, no filler yet: the child waits. growsdown: the region can grow down as a stack does.
void lazy_make(struct lazy *lazy, uint64_t n_pages, int growsdown, lazy_body *body);
void lazy_fill(struct lazy *lazy, uint32_t options); // the filler, not started
void lazy_run(struct lazy *lazy);                    // filler starts, child runs
int lazy_wait(struct lazy *lazy);                    // the child's wait status
void lazy_free(struct lazy *lazy);

#endif
