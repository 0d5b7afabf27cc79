//go:build tools

// Package tools pins the minio command that the tests run.
package tools

import _ "github.com/minio/minio"
