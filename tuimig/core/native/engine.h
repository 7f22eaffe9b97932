// The engine's one public header.
#ifndef TM_ENGINE_H
#define TM_ENGINE_H
#include "error.h"
#include "fill.h"
#include "ring.h"
#include "source.h"
#include "spool.h"
#include "stream.h"
#include "stub.h"
#endif
